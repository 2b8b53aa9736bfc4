"""The closed form on token counts is the gradient of attention over positions."""

from dataclasses import replace

import pytest
import torch

from toy_tasks.scan_snap_data import Batch, ScanSnapConfig, class_law
from toy_tasks.scan_snap_dynamics import (
    Ascent,
    Weights,
    ascent,
    attention,
    class_attention,
    common_mass,
    distinct_entropy,
    first_weights,
    forward,
    mean_loss,
    update,
)

CONFIG = ScanSnapConfig(
    n_queries=3, n_classes_per_query=2, n_common=3, n_common_per_query=2, n_distinct=4
)


def loss_over_positions(Y, Z, tokens, query_id, target):
    """The paper's definition: one-hot tokens, the query attends to all positions before it."""
    X = torch.nn.functional.one_hot(tokens, len(Y)).double()
    scores = torch.einsum("bm,bpm->bp", Z[query_id], X)
    b = scores.softmax(dim=1)
    a = torch.einsum("bpm,bp->bm", X, b)
    f = a / a.square().sum(dim=1, keepdim=True).sqrt()
    return torch.nn.functional.cross_entropy(f @ Y, target)


def sequences(seed, batch_size=7, n_drawn=20):
    """Random sequences, as tokens and as a batch of one run."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.n_context, (batch_size, n_drawn), generator=generator)
    query = torch.randint(CONFIG.n_queries, (batch_size,), generator=generator)
    target = torch.randint(CONFIG.n_tokens, (batch_size,), generator=generator)
    counts = torch.nn.functional.one_hot(tokens, CONFIG.n_tokens).sum(dim=1).double()
    return tokens, query, target, Batch(counts[None], query[None], target[None])


def random_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    size = (CONFIG.n_tokens, CONFIG.n_tokens)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in "YZ"]


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_attention_over_positions(seed):
    tokens, query, target, batch = sequences(seed)
    Y, Z = (matrix.requires_grad_() for matrix in random_matrices(seed + 10))
    loss = loss_over_positions(Y, Z, tokens, CONFIG.n_context + query, target)
    loss.backward()
    queries = slice(CONFIG.n_context, CONFIG.n_context + CONFIG.n_queries)
    weights = Weights(Y.detach()[None], Z.detach()[None, queries])
    attended = forward(weights, batch)
    found = ascent(weights, batch, attended)
    torch.testing.assert_close(mean_loss(attended, batch)[0], loss.detach())
    torch.testing.assert_close(found.Y[0], -Y.grad)
    torch.testing.assert_close(found.Z[0], -Z.grad[queries])
    unused = torch.ones(CONFIG.n_tokens, dtype=torch.bool)
    unused[queries] = False
    assert Z.grad[unused].abs().max() == 0


def test_rows_of_both_gradients_sum_to_zero():
    *_, batch = sequences(4)
    Y, Z = random_matrices(5)
    weights = Weights(Y[None], Z[None, : CONFIG.n_queries])
    for slope in ascent(weights, batch, forward(weights, batch)):
        assert slope.sum(dim=-1).abs().max() < 1e-12
        assert slope.abs().max() > 1e-3


def test_a_token_that_does_not_occur_gets_no_attention_however_large_its_logit():
    a = attention(torch.tensor([0.0, 0.0, 1000.0]), torch.tensor([3.0, 1.0, 0.0]))
    assert a[2] == 0
    assert a[:2].tolist() == pytest.approx([0.75, 0.25])


def test_runs_do_not_touch_each_other():
    one, other = sequences(6)[3], sequences(7)[3]
    both = Batch(*(torch.cat(parts) for parts in zip(one, other, strict=True)))
    weights = Weights(*(torch.stack(random_matrices(seed)) for seed in (8, 9)))
    together = ascent(weights, both, forward(weights, both))
    alone = Weights(*(matrix[1:] for matrix in weights))
    expected = ascent(alone, other, forward(alone, other))
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found[1:], wanted)


def test_an_update_is_that_of_torch_sgd_with_momentum():
    matrix = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([matrix], lr=0.3, momentum=0.9)
    weights = Weights(*torch.zeros(2, 1, 2, 3, dtype=torch.float64))
    velocity = Weights(*torch.zeros(2, 1, 2, 3, dtype=torch.float64))
    rates = (torch.tensor([0.3]).double(), torch.tensor([0.1]).double())
    for step in range(4):
        slope = torch.arange(6, dtype=torch.float64).view(2, 3) - step
        matrix.grad = -slope
        optimizer.step()
        update(weights, velocity, Weights(slope[None], slope[None]), rates, 0.9)
    torch.testing.assert_close(weights.Y[0], matrix.detach())
    torch.testing.assert_close(weights.Z, weights.Y / 3)


def test_an_adam_step_is_that_of_torch():
    matrices = [torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True) for _ in "YZ"]
    optimizer = torch.optim.Adam(
        [{"params": [matrices[0]], "lr": 0.3}, {"params": [matrices[1]], "lr": 0.1}],
        betas=(0.8, 0.999),
    )
    weights = Weights(*torch.full((2, 1, 2, 3), 0.5, dtype=torch.float64))
    rates = (torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64))
    climb = Ascent("adam", rates, 0.8)
    moments = climb.start(weights)
    for step in range(5):
        slope = torch.arange(6, dtype=torch.float64).view(2, 3) - step
        for matrix in matrices:
            matrix.grad = -slope
        optimizer.step()
        climb.step(weights, moments, Weights(slope[None], slope[None]), step)
    for found, wanted in zip(weights, matrices, strict=True):
        torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-12, atol=1e-12)


def test_first_weights_are_zero_or_of_the_stated_spread():
    config = replace(CONFIG, n_distinct=60)
    bound = config.n_tokens**-0.5
    assert all(matrix.abs().max() == 0 for matrix in first_weights(config, 0, torch.float64))
    uniform = first_weights(replace(config, init="uniform"), 0, torch.float64).Y
    assert uniform.abs().max() <= bound
    normal = first_weights(replace(config, init="normal"), 0, torch.float64).Y
    assert normal.abs().max() > bound
    for matrix in (uniform, normal):
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    other = first_weights(replace(config, init="uniform"), 1, torch.float64).Y
    assert not torch.equal(uniform, other)


def test_class_attention_by_hand():
    config = ScanSnapConfig(n_common=1, n_distinct=2, n_queries=1, n_classes_per_query=2)
    law = class_law(config)  # weights 1 | 0.1 1 | 0.1 1
    z = torch.zeros(1, 1, config.n_tokens, dtype=torch.float64)
    z[0, 0, 0], z[0, 0, 2] = -torch.log(torch.tensor(2.0)), torch.log(torch.tensor(3.0))
    c = class_attention(z, law)[0]
    expected = torch.tensor([[0.5, 0.1, 3.0], [0.5, 0.1, 1.0]], dtype=torch.float64)
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(c[0, :3], expected[0])
    torch.testing.assert_close(c[1, [0, 3, 4]], expected[1])
    assert common_mass(c, law).tolist() == pytest.approx([0.5 / 3.6, 0.5 / 1.6])
    shares = torch.tensor([[0.1 / 3.1, 3.0 / 3.1], [0.1 / 1.1, 1.0 / 1.1]])
    by_hand = -(shares * shares.log()).sum(dim=1)
    torch.testing.assert_close(distinct_entropy(c, law), by_hand.double())
