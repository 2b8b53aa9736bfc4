"""The search against the exactly solved case: a linear readout."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from probes.activation_attacks_optimise import (
    NO_TARGET,
    Descent,
    Listener,
    Problems,
    force_tokens,
    score,
)
from probes.activation_attacks_scaling import fit, reached_half
from tests.probes.linear_readout import draw_readouts, feasible_share, linear_logits


def search(readout, targets, *, free=None, at_once=1000, descent=None):
    """n_correct, perturbation of every problem."""
    n, n_dims = readout.shape[0], readout.shape[-1]
    free = torch.ones(n, 1, n_dims) if free is None else free
    found = {}
    force_tokens(
        linear_logits(readout),
        Problems(targets, free),
        descent or Descent(),
        at_once,
        Listener(found.__setitem__),
    )
    return [found[index] for index in range(n)]


def feasible(readout, targets):
    """A linear program of scipy says whether some P makes every target the strict argmax."""
    rows = []
    for weights, target in zip(readout.double(), targets, strict=True):
        others = torch.arange(len(weights)) != target
        rows.append(weights[others] - weights[target])
    matrix = torch.cat(rows).numpy()
    limit = -np.ones(len(matrix))  # the scale of P is free: by any margin is by a margin of 1
    found = linprog(np.zeros(matrix.shape[1]), matrix, limit, bounds=(None, None), method="highs")
    return found.status == 0


def draw(n_problems, n_target, n_dims, d_vocab=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    readout = draw_readouts((n_problems, n_target, d_vocab, n_dims), generator)
    return readout, torch.randint(d_vocab, (n_problems, n_target), generator=generator)


def test_wendel_by_hand():
    # Three half-lines fit on one side of a line: all draws but the 2 alternating of 8 sign patterns.
    assert feasible_share(1, 1) == 1.0
    assert feasible_share(2, 1) == 0.5
    assert feasible_share(3, 2) == 0.75
    assert feasible_share(4, 2) == 0.5
    assert feasible_share(32, 16) == 0.5
    assert feasible_share(16, 16) == 1.0
    assert feasible_share(34, 16) == pytest.approx(0.36, abs=0.01)  # card section 6


def test_the_linear_program_agrees_with_wendel():
    readout, targets = draw(120, 12, 6)
    share = np.mean([feasible(w, t) for w, t in zip(readout, targets, strict=True)])
    assert share == pytest.approx(0.5, abs=3 * math.sqrt(0.25 / 120))


@pytest.mark.parametrize("n_target", [8, 12, 13, 14, 16, 24])
def test_never_above_feasibility_and_close_to_it_where_it_is_high(n_target):
    readout, targets = draw(60, n_target, 8)
    possible = [feasible(w, t) for w, t in zip(readout, targets, strict=True)]
    reached = [found.n_correct == n_target for found in search(readout, targets)]
    assert all(p for p, r in zip(possible, reached, strict=True) if r)
    if np.mean(possible) >= 0.7:
        assert np.mean(reached) >= 0.7 * np.mean(possible)
    if n_target == 24:  # Wendel: 1.7 percent
        assert np.mean(reached) < 0.2


@pytest.mark.parametrize("n_dims", [4, 16, 32])
def test_as_many_tokens_as_dimensions_always_succeed(n_dims):
    found = search(*draw(40, n_dims, n_dims))
    assert all(each.n_correct == n_dims for each in found)


@pytest.mark.parametrize("d_vocab", [16])
def test_larger_vocabularies_are_sound_too(d_vocab):
    readout, targets = draw(30, 6, 16, d_vocab)
    possible = [feasible(w, t) for w, t in zip(readout, targets, strict=True)]
    reached = [found.n_correct == 6 for found in search(readout, targets)]
    assert all(p for p, r in zip(possible, reached, strict=True) if r)
    assert 0.2 < np.mean(reached) < 0.9  # card: 0.55 of 0.70


def half_point(n_dims, grid, free=None):
    share = []
    for n_target in grid:
        readout, targets = draw(24, n_target, n_dims, seed=n_target)
        mask = None if free is None else free.expand(24, 1, n_dims)
        found = search(readout, targets, free=mask)
        share.append(np.mean([each.n_correct == n_target for each in found]))
    t_max, _ = reached_half(torch.tensor(grid), torch.tensor([share], dtype=torch.float32))
    return float(t_max)


@pytest.mark.slow
def test_it_is_linear_in_the_dimensions():
    dims = [8, 16, 32]
    found = [half_point(n, [int(n * r) for r in (1.5, 1.75, 2, 2.25)]) for n in dims]
    exponent = fit(torch.tensor(dims), torch.tensor(found)).exponent
    assert 0.9 <= exponent <= 1.15  # card section 6
    assert all(1.4 * n <= t <= 2.2 * n for n, t in zip(dims, found, strict=True))


def test_half_of_the_dimensions_force_half_of_the_tokens():
    grid = [10, 13, 16, 24, 28, 32]
    free = (torch.arange(16) % 2 == 0).float()
    ratio = half_point(16, grid, free) / half_point(16, grid)
    assert 0.4 <= ratio <= 0.6


def test_ties_are_no_success():
    # With a readout of zeros all logits stay equal, and argmax would call token 0 forced.
    readout, targets = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, dtype=torch.long)
    assert all(found.n_correct == 0 for found in search(readout, targets))
    loss, correct = score(torch.zeros(1, 3, 5), targets[:1], 0.0)
    assert not correct.any()
    assert loss.item() == pytest.approx(math.log(5))


def test_score_by_hand():
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 3.0, 3.0], [9.0, 0.0, 0.0]]])
    targets = torch.tensor([[0, 1, NO_TARGET]])
    loss, correct = score(logits, targets, 0.5)
    first = math.log(math.e**2 + math.e + 1) - 2.0
    second = math.log(1 + 2 * math.e**3) - 3.0
    assert loss.item() == pytest.approx((first + second) / 2)
    assert correct.tolist() == [[True, False, False]]
    assert score(logits, targets, 1.0)[1].tolist() == [[False, False, False]]


# Batches


def test_alone_and_refilled_problems_end_alike():
    readout, targets = draw(11, 10, 8)
    whole = search(readout, targets)
    for at_once in (1, 3):
        parts = search(readout, targets, at_once=at_once)
        for one, other in zip(whole, parts, strict=True):
            assert one.n_correct == other.n_correct
            assert one.n_steps == other.n_steps
            torch.testing.assert_close(one.perturbation, other.perturbation)


def test_it_is_the_adam_of_torch():
    readout, targets = draw(1, 40, 8)  # infeasible: all steps are taken
    steps = 25
    found = search(readout, targets, descent=Descent(lr=0.05, steps=steps))[0]
    p = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.05)
    best = (-1, math.inf, p.detach().clone())
    for step in range(steps + 1):
        logits = torch.einsum("tvd,d->tv", readout[0], p)
        loss = torch.nn.functional.cross_entropy(logits, targets[0])
        n_correct = int((logits.argmax(-1) == targets[0]).sum())
        if step == 0:
            n_correct = 0  # all logits are equal
        if (n_correct, -loss.item()) > (best[0], -best[1]):
            best = (n_correct, loss.item(), p.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found.n_correct == best[0]
    assert found.loss == pytest.approx(best[1], rel=1e-4)
    torch.testing.assert_close(found.perturbation[0], best[2], rtol=1e-4, atol=1e-5)


def test_problems_end_early_and_are_told_at_once():
    readout, targets = draw(6, 3, 16)
    told = []
    passes = []
    logits_of = linear_logits(readout)

    def counted(perturbation, problem):
        passes.append(len(problem))
        return logits_of(perturbation, problem)

    force_tokens(
        counted,
        Problems(targets, torch.ones(6, 1, 16)),
        Descent(),
        2,
        Listener(lambda index, reached: told.append((index, len(passes), reached.n_steps))),
    )
    assert max(passes) == 2
    assert sorted(index for index, _, _ in told) == list(range(6))
    assert [at for _, at, _ in told] == sorted(at for _, at, _ in told)
    assert all(n_steps < 50 for _, _, n_steps in told)
    # No place stays empty while problems wait: passes are those of the steps, by twos.
    assert sum(passes) == sum(n_steps + 1 for _, _, n_steps in told)


def test_out_of_memory_halves_the_passes_and_loses_nothing():
    readout, targets = draw(8, 10, 8)
    logits_of, sizes = linear_logits(readout), []

    def small(perturbation, problem):
        if len(problem) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(problem))
        return logits_of(perturbation, problem)

    found = {}
    free = torch.ones(8, 1, 8)
    left = force_tokens(small, Problems(targets, free), Descent(), 8, Listener(found.__setitem__))
    assert left == 2
    assert max(sizes) == 2
    for index, wanted in enumerate(search(readout, targets)):
        assert found[index].n_correct == wanted.n_correct
        assert found[index].n_steps == wanted.n_steps

    def broken(perturbation, problem):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        force_tokens(broken, Problems(targets, free), Descent(), 8, Listener(found.__setitem__))


@pytest.mark.parametrize(("norm", "bound"), [("l2", 0.3), ("linf", 0.1)])
def test_bounds_hold_and_cost(norm, bound):
    readout, targets = draw(20, 12, 12)
    readout[:, :, :, :] *= 3.0
    bounded = search(readout, targets, descent=Descent(norm=norm, bound=bound, margin=1.0))
    free = search(readout, targets, descent=Descent(margin=1.0))
    order = 2 if norm == "l2" else math.inf
    for each in bounded:
        assert torch.linalg.vector_norm(each.perturbation, order) <= bound * 1.0001
    assert sum(e.n_correct for e in bounded) < sum(e.n_correct for e in free)


def test_masked_dimensions_stay_exactly_zero():
    readout, targets = draw(5, 30, 8)
    free = torch.ones(5, 1, 8)
    free[:, :, ::2] = 0.0
    for each in search(readout, targets, free=free):
        assert (each.perturbation[0, ::2] == 0.0).all()
        assert (each.perturbation[0, 1::2] != 0.0).all()
