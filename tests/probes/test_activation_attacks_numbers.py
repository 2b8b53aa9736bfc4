"""Lengths that are searched, resampled fits and headline numbers, by hand."""

import dataclasses
import math

import pytest
import torch

from probes.activation_attacks_results import ActivationAttackResult
from probes.activation_attacks_scaling import bootstrap, fit, interval
from probes.activation_attacks_search import Search
from probes.activation_attacks_tokens import substitute
from tests.probes.attacked_models import bench_of
from toy_tasks.model import ToyModelConfig, make_model
from workbench.models.toy import ToyAdapter

NAN = math.nan

# Search


def test_lengths_are_doubled_until_one_fails_and_then_halved():
    search, asked = Search(100, 0.0), []
    while (t := search.ask()) is not None:
        asked.append(t)
        search.tell(t, 1.0 if t <= 11 else 0.4)
    assert asked == [1, 2, 4, 8, 16, 12, 10, 11]
    assert (search.low, search.high, search.left()) == (11, 12, 0)


@pytest.mark.parametrize(
    ("resolution", "low", "high", "over"),
    [(0.1, 20, 22, True), (0.1, 20, 23, False), (0.1, 29, 31, True), (0.0, 5, 6, True)],
)
def test_a_search_ends_at_its_resolution_or_at_one_token(resolution, low, high, over):
    search = Search(100, resolution, low, high)
    assert (search.ask() is None) == over
    if not over:
        assert search.ask() == (low + high) // 2


def test_what_is_left_of_a_search():
    assert Search(100, 0.0).left() == 2 + 1  # nothing is known
    assert Search(100, 0.0, 8).left() == 2 + 4  # double, then bisect the 8
    assert Search(100, 0.0, 8, 16).left() == 3
    assert Search(100, 0.25, 8, 16).left() == 2
    assert Search(100, 0.5, 8, 13).left() == 1
    assert Search(8, 0.0, 8).left() == 0  # nothing longer may be tried
    assert Search(9, 0.0, 8).ask() == 9


# Scaling


def test_resampled_seeds_are_drawn_and_averaged(monkeypatch):
    monkeypatch.setattr("probes.activation_attacks_scaling.N_RESAMPLES", 40)
    # One a; half of it fails between 1 and 3 for a share of the seeds that is drawn.
    curve_t, a = torch.tensor([1, 3]), torch.tensor([2])
    success = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    fits = bootstrap(a, curve_t, success)
    generator = torch.Generator().manual_seed(0)
    assert len(fits) == 40
    for found in fits:
        drawn = torch.randint(3, (3,), generator=generator)
        first, second = (float(success[0, row, drawn].sum()) / 3 for row in range(2))
        t_max = 0.0
        if second >= 0.5:
            t_max = 3.0
        elif first >= 0.5:
            t_max = 1.0 + 2.0 * (first - 0.5) / (first - second)
        assert found.kappa == pytest.approx(2 * t_max / 4, rel=1e-5)
        assert math.isnan(found.exponent)


def test_a_single_attacker_that_differs_has_no_exponent_and_intervals_leave_nan_out():
    assert math.isnan(fit(torch.tensor([2, 2]), torch.tensor([3.0, 5.0])).exponent)
    assert fit(torch.tensor([1, 2]), torch.tensor([3.0, 0.0])).kappa == pytest.approx(3 / 5)
    values = [float(value) for value in range(101)]
    assert interval([*values, NAN]) == pytest.approx((2.5, 97.5))
    assert all(math.isnan(end) for end in interval([NAN]))


def result(**changes):
    """Two a, three lengths, two seeds."""
    success = torch.tensor(
        [[[1.0, 1.0], [0.5, 0.0], [NAN, NAN]], [[1.0, 1.0], [1.0, 1.0], [1.0, 0.5]]]
    )
    fields = {
        "n_attacked": torch.tensor([1, 3]),
        "t_max": torch.tensor([1.5, 4.0]),
        "censored": torch.tensor([False, True]),
        "success": success,
        "accuracy": success,
        "curve_t": torch.tensor([1, 2, 4]),
        "n_steps": torch.where(success.isnan(), NAN, 10 * success + 1),
        "norm_ratio": torch.where(success.isnan(), NAN, success / 2),
        "generation_agrees": torch.where(success.isnan(), NAN, (success > 0).float()),
        "example_context": torch.zeros(2, 8, dtype=torch.long),
        "example_positions": torch.zeros(2, 3, dtype=torch.long),
        "example_target": torch.zeros(2, 4, dtype=torch.long),
        "example_perturbation": torch.zeros(2, 3, 16),
        "d_vocab": torch.tensor(64),
    }
    return ActivationAttackResult(**{**fields, **changes})


def test_headline_numbers_by_hand(monkeypatch):
    monkeypatch.setattr("probes.activation_attacks_scaling.N_RESAMPLES", 20)
    found = result().metrics()
    kappa = (1 * 1.5 + 3 * 4.0) / (1 + 9)
    assert found["kappa"] == pytest.approx(kappa)
    assert found["chi"] == pytest.approx(16 * 16 / (kappa * 6))
    assert found["exponent"] == pytest.approx(math.log(4 / 1.5) / math.log(3), rel=1e-6)
    assert (found["n_seeds"], found["n_problems"], found["n_censored"]) == (2.0, 10.0, 1.0)
    assert found["generation_agreement"] == pytest.approx(9 / 10)
    assert found["kappa_low"] <= found["kappa_high"]
    assert "kappa_tokens" not in found
    tokens = result(t_max_tokens=torch.tensor([1.0, 2.0])).metrics()
    assert tokens["kappa_tokens"] == pytest.approx(7 / 10)
    assert tokens["chi_tokens"] == pytest.approx(10 / 7)
    none = result(
        t_max_tokens=torch.zeros(2),
        generation_agrees=torch.full((2, 3, 2), NAN),
        t_max=torch.zeros(2),
    ).metrics()
    assert none["kappa_tokens"] == none["kappa"] == 0.0
    assert not {"chi", "chi_tokens", "exponent", "generation_agreement"} & set(none)


def test_the_table_has_a_row_a_length_that_was_tried():
    table = result().table()
    assert table["n_attacked"] == [1, 1, 3, 3, 3]
    assert table["t"] == [1, 2, 1, 2, 4]
    assert table["success"] == table["accuracy"] == [1.0, 0.25, 1.0, 1.0, 0.75]
    assert table["all_correct"] == [1.0, 0.0, 1.0, 1.0, 0.5]
    assert table["n_steps"] == [11.0, 3.5, 11.0, 11.0, 8.5]
    assert table["norm_ratio"] == [0.5, 0.125, 0.5, 0.5, 0.375]
    assert table["t_max"] == [1.5, 1.5, 4.0, 4.0, 4.0]


# The attack with tokens


def coordinate_search(bench, row, positions, n_target):
    """Position by position, every token tried alone, until a sweep gains nothing."""
    target = bench.cases.targets[row, :n_target]

    def tried(context):
        whole = torch.cat([context, target[:-1]])[None]
        logits = bench.model.logits(whole)[0, len(context) - 1 :]
        forced = 0
        for at, token in enumerate(target.tolist()):
            rivals = [float(x) for other, x in enumerate(logits[at]) if other != token]
            forced += float(logits[at, token]) - max(rivals) > bench.margin
        return float(torch.nn.functional.cross_entropy(logits, target)), forced

    context = bench.cases.contexts[row].clone()
    loss, forced = tried(context)
    best, n_tried = (forced, context), 1
    for _ in range(20):
        before = loss
        for pos in positions:
            if best[0] == n_target:
                break
            options = [context.clone() for _ in range(bench.model.spec.d_vocab)]
            for token, option in enumerate(options):
                option[pos] = token
            found = [tried(option) for option in options]
            n_tried += len(options)
            most = max(count for _, count in found)
            if most > best[0]:
                best = (most, options[[count for _, count in found].index(most)])
            least = min(each for each, _ in found)
            if least < loss:
                loss, context = least, options[[each for each, _ in found].index(least)]
        if best[0] == n_target or loss >= before or len(positions) == 1:
            break
    return best, loss, n_tried


@pytest.mark.parametrize(
    ("positions", "n_target", "margin"),
    [((2,), 3, 0.001), ((0, 5), 2, 0.25), ((0, 3, 5), 3, 0.001)],
)
def test_tokens_are_replaced_position_by_position(positions, n_target, margin):
    config = ToyModelConfig(d_vocab=7, n_layers=1, n_heads=2, d_model=16, n_ctx=16)
    model = ToyAdapter(make_model(config, 0))
    bench = dataclasses.replace(bench_of(model, n_context=6, n_target=3), margin=margin)
    best, loss, n_tried = coordinate_search(bench, 1, positions, n_target)
    for budget in (1 << 30, 1):  # all tokens in one pass, or each in its own
        tight = dataclasses.replace(bench, budget_bytes=budget)
        found = substitute(tight, 1, positions, n_target, None)
        assert found.n_correct == best[0]
        assert torch.equal(found.tokens, best[1])
        assert found.loss == pytest.approx(loss, rel=1e-4)
        assert found.n_tried == n_tried
