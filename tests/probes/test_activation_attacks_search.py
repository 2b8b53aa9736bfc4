"""From curves to t_max, kappa, exponent and chi; and the attack with tokens."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import workbench as wb
from probes.activation_attacks import ActivationAttackConfig, measure_activation_attacks
from probes.activation_attacks_bench import Cell, make_bench
from probes.activation_attacks_cases import Cases
from probes.activation_attacks_scaling import bootstrap, fit, interval, reached_half, resistance
from probes.activation_attacks_search import Search, find_limits, success_of
from probes.activation_attacks_tokens import gradient_shortlist, substitute
from tests.zoo import D_VOCAB, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.models.base import Site
from workbench.models.names import demo_folder
from workbench.models.toy import ToyAdapter

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
NAN = math.nan

# Numbers worked by hand


def test_the_half_point_lies_between_what_passed_and_what_failed():
    t = torch.tensor([1, 2, 4, 8])
    share = torch.tensor(
        [
            [1.0, 1.0, 0.75, 0.25],  # half way from 4 to 8
            [1.0, NAN, 0.5, 0.0],  # exactly one half at 4
            [0.25, NAN, NAN, NAN],  # not even one token
            [1.0, 1.0, 1.0, NAN],  # never seen to fail
            [1.0, 0.0, 0.8, 0.2],  # the last crossing counts
        ]
    )
    t_max, censored = reached_half(t, share)
    assert t_max.tolist() == pytest.approx([6.0, 4.0, 0.0, 4.0, 6.0])
    assert censored.tolist() == [False, False, False, True, False]


def test_kappa_exponent_and_chi_by_hand():
    a = torch.tensor([1, 2, 4])
    exact = fit(a, torch.tensor([5.0, 10.0, 20.0]))
    assert exact.kappa == pytest.approx(5.0)
    assert exact.exponent == pytest.approx(1.0)
    square = fit(a, torch.tensor([1.0, 4.0, 16.0]))
    assert square.kappa == pytest.approx((1 + 8 + 64) / 21)
    assert square.exponent == pytest.approx(2.0)
    # A t_max of 0 has no logarithm, but it pulls kappa down.
    some = fit(a, torch.tensor([0.0, 4.0, 8.0]))
    assert some.exponent == pytest.approx(1.0)
    assert some.kappa == pytest.approx(40 / 21)
    assert math.isnan(fit(a[:1], torch.tensor([3.0])).exponent)
    # Card section 3: d = 512, V = 50304, chi 16 ... 25 is kappa 33 ... 21.
    assert resistance(33.0, 512, 50304, 16) == pytest.approx(15.9, abs=0.1)
    assert resistance(21.0, 512, 50304, 16) == pytest.approx(25.0, abs=0.1)
    # V = 2: kappa = 2 d gives p / 2.
    assert resistance(128.0, 64, 2, 16) == 8.0


def test_success_is_one_only_when_all_tokens_are_forced():
    accuracy = torch.tensor([0.99, 1.0, NAN])
    assert success_of(accuracy, "all-correct").nan_to_num(-1).tolist() == [0.0, 1.0, -1.0]
    assert success_of(accuracy, "per-token") is accuracy


def test_intervals_hold_the_law_and_close_without_spread():
    a, t = torch.tensor([1, 2, 4]), torch.tensor([4, 8, 16, 32])
    success = torch.full((3, 4, 6), NAN)
    for row in range(3):
        success[row, : row + 1] = 1.0
        success[row, row + 1] = 0.0
    fits = bootstrap(a, t, success)
    low, high = interval([each.kappa for each in fits])
    assert low == pytest.approx(high)  # all seeds alike
    assert fits[0].exponent == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(1)
    for row in range(3):  # where it falls differs from seed to seed
        success[row, row + 1] = (torch.rand(6, generator=generator) > 0.5).float()
    low, high = interval([each.kappa for each in bootstrap(a, t, success)])
    assert low < fit(a, reached_half(t, success.mean(-1))[0]).kappa < high


# Search


def run_search(limits, *, limit=100, resolution=0.0):
    """Cells whose every target up to a planted length succeeds."""
    rounds, reports = [], []

    def evaluate(asked):
        rounds.append(asked)
        return {
            (cell, t): torch.tensor([float(t <= limits[len(cell.positions) - 1])] * 2)
            for cell, t in asked
        }

    cells = [Cell(tuple(range(n + 1))) for n in range(len(limits))]
    curves = find_limits(
        cells,
        Search(limit, resolution),
        evaluate,
        "all-correct",
        lambda *said: reports.append(said),
    )
    return curves, rounds, reports


def test_planted_limits_are_found():
    limits = [1, 7, 23, 64]
    curves, rounds, reports = run_search(limits)
    share = curves.accuracy.mean(-1)
    t_max, censored = reached_half(curves.curve_t, share)
    for row, planted in enumerate(limits):
        measured = ~share[row].isnan()
        assert planted in curves.curve_t[measured]
        assert planted + 1 in curves.curve_t[measured]
    assert t_max.tolist() == pytest.approx([planted + 0.5 for planted in limits])
    assert not censored.any()
    assert len(rounds) <= 2 * math.log2(64) + 2
    assert all(len(asked) <= 4 for asked in rounds)
    assert reports[-1][0] == reports[-1][1] == sum(map(len, rounds))


def test_a_limit_and_a_null_are_told():
    curves, _, _ = run_search([0, 50], limit=20)
    t_max, censored = reached_half(curves.curve_t, curves.accuracy.mean(-1))
    assert t_max.tolist() == [0.0, 20.0]
    assert censored.tolist() == [False, True]


def test_exactly_one_half_is_success():
    def evaluate(asked):
        return {(cell, t): torch.tensor([float(t <= 5), 0.0]) for cell, t in asked}

    cells = [Cell((0,))]
    curves = find_limits(cells, Search(50, 0.0), evaluate, "all-correct", lambda *_: None)
    assert curves.curve_t.max() == 8
    assert {5, 6} <= set(curves.curve_t.tolist())


def test_a_coarse_resolution_asks_less():
    fine, coarse = run_search([60])[1], run_search([60], resolution=0.25)[1]
    assert len(coarse) < len(fine)


# The attack with tokens


def bench_of(model, n_target=4):
    generator = torch.Generator().manual_seed(5)
    cases = Cases(
        torch.randint(3, model.spec.d_vocab, (2, 6), generator=generator),
        torch.randint(3, model.spec.d_vocab, (2, n_target), generator=generator),
    )
    return make_bench(model, 0, cases, {1.0: torch.ones(model.spec.d_model)})


def toy():
    config = ToyModelConfig(d_vocab=7, n_layers=2, n_heads=2, d_model=16, n_ctx=16)
    return ToyAdapter(make_model(config, 0))


def count_forced(model, context, target):
    """Plain: the argmax after each prefix."""
    tokens = context.tolist()
    forced = 0
    for token in target.tolist():
        logits = model.logits(torch.tensor([tokens]))[0, -1]
        forced += int(logits.argmax() == token)
        tokens.append(token)
    return forced


@pytest.mark.parametrize("n_target", [1, 3])
@pytest.mark.parametrize("make", [lambda: wb.wrap(tiny_model("llama")), toy], ids=["llama", "toy"])
def test_one_position_is_searched_exhaustively(make, n_target):
    model = make()
    bench = bench_of(model)
    context, target = bench.cases.contexts[0], bench.cases.targets[0, :n_target]
    best, losses = 0, []
    for token in range(model.spec.d_vocab):
        changed = context.clone()
        changed[4] = token
        best = max(best, count_forced(model, changed, target))
        logits = model.logits(torch.cat([changed, target[:-1]])[None])[0, 5:]
        losses.append(float(torch.nn.functional.cross_entropy(logits, target)))
    found = substitute(bench, 0, (4,), n_target, None)
    assert found.n_correct == best
    assert count_forced(model, found.tokens, target) == best
    assert found.loss == pytest.approx(min(losses), rel=1e-5)
    kept = [pos for pos in range(6) if pos != 4]
    assert torch.equal(found.tokens[kept], context[kept])
    assert found.n_tried <= 1 + model.spec.d_vocab


def test_two_positions_are_near_the_best_of_all_pairs():
    model = toy()
    bench = bench_of(model)
    contexts, targets = bench.cases.contexts, bench.cases.targets
    total = [0, 0]
    for row in range(2):
        pairs = []
        for pair in itertools.product(range(7), repeat=2):
            changed = contexts[row].clone()
            changed[[0, 5]] = torch.tensor(pair)
            pairs.append(count_forced(model, changed, targets[row, :2]))
        found = substitute(bench, row, (0, 5), 2, None)
        assert found.n_correct <= max(pairs)  # never above what exists
        assert count_forced(model, found.tokens, targets[row, :2]) == found.n_correct
        total[0] += found.n_correct
        total[1] += max(pairs)
    assert total[0] >= total[1] - 1


def test_the_gradient_orders_tokens_as_a_linear_loss_would():
    model = wb.wrap(tiny_model("gpt2"))
    bench = bench_of(model)
    tokens, target = bench.cases.contexts[0], bench.cases.targets[0, :2]
    order = gradient_shortlist(bench, tokens, 5, target, D_VOCAB)
    whole = torch.cat([tokens, target[:1]])[None]
    site = Site("resid_pre", 0)
    resid = model.capture(whole, [site])[site]
    embedding, step = model.weight("W_E"), 1e-3

    def loss(moved):
        logits = model.continue_from(0, moved, last=2)
        return torch.nn.functional.cross_entropy(logits[0].double(), target)

    slopes = []
    for token in range(D_VOCAB):
        change = torch.zeros_like(resid)
        change[0, 5] = step * (embedding[token] - embedding[tokens[5]])
        slopes.append(float((loss(resid + change) - loss(resid - change)) / (2 * step)))
    ranked = sorted(range(D_VOCAB), key=slopes.__getitem__)
    assert set(order[:10].tolist()) == set(ranked[:10])
    assert torch.equal(gradient_shortlist(bench, tokens, 5, target, 7), order[:7])


def test_a_shortlist_of_everything_is_the_exhaustive_search():
    bench = bench_of(wb.wrap(tiny_model("gpt2")))
    whole, listed = (substitute(bench, 1, (2, 5), 2, size) for size in (None, D_VOCAB))
    assert whole.n_correct == listed.n_correct
    assert whole.loss == pytest.approx(listed.loss)
    short = substitute(bench, 1, (2, 5), 2, 5)
    assert short.n_tried < whole.n_tried


def test_out_of_memory_tries_fewer_tokens_at_once(monkeypatch):
    bench = bench_of(wb.wrap(tiny_model("gpt2")))
    wanted = substitute(bench, 0, (3,), 2, None)
    run = bench.model.logits

    def small_machine(tokens, *rest, **options):
        if len(tokens) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens, *rest, **options)

    monkeypatch.setattr(bench.model, "logits", small_machine)
    found = substitute(bench, 0, (3,), 2, None)
    assert (found.n_correct, found.n_tried) == (wanted.n_correct, wanted.n_tried)


# Real models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_forced_tokens_grow_about_linearly_on_trained_models(name):
    folder = demo_folder() if name == "demo" else STORIES
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs the weights of {name}")
    config = ActivationAttackConfig(
        n_attacked=(1, 2, 4), context=16, positions="last", token_attack=False
    )
    model = wb.load(str(folder))
    result = measure_activation_attacks(model, torch.zeros(0, 0, dtype=torch.long), config)
    metrics = result.metrics()
    assert 0.7 <= metrics["exponent"] <= 1.3  # card section 7
    assert metrics["exponent_low"] <= metrics["exponent"] <= metrics["exponent_high"]
    assert 8 <= metrics["chi"] <= 60
    assert (result.t_max.diff() > 0).all()
    assert metrics["generation_agreement"] > 0.98
