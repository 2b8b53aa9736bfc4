"""Activation attacks on models: what is changed, what is left alone, what is forced."""

import math

import pytest
import torch

import workbench as wb
from probes.activation_attacks import measure_activation_attacks
from probes.activation_attacks_bench import (
    Cell,
    Outcome,
    Problem,
    make_bench,
    perturbed,
    verify,
)
from probes.activation_attacks_cases import (
    Cases,
)
from probes.activation_attacks_optimise import Descent, Reached
from probes.activation_attacks_replay import (
    PerturbPositions,
    agrees_with_generation,
    generate_greedily,
)
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.attacked_models import MODELS, NO_DATA, bench_of, small, solved
from tests.zoo import tiny_model

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

# The perturbation is where it may be, and nowhere else


def test_untouched_positions_and_dimensions_are_exactly_as_they_were():
    resid = torch.randn(2, 5, 4)
    positions = torch.tensor([[1, 3], [0, 4]])
    change = torch.randn(2, 2, 4)
    after = perturbed(resid, positions, change)
    for row in range(2):
        touched = torch.zeros(5, dtype=torch.bool)
        touched[positions[row]] = True
        assert torch.equal(after[row, ~touched], resid[row, ~touched])
        torch.testing.assert_close(
            after[row, positions[row]] - resid[row, positions[row]], change[row]
        )


def test_masked_dimensions_and_unused_places_stay_exactly_zero():
    model = MODELS["gpt2"]()
    free = (torch.arange(32) < 10).float()
    bench = bench_of(model, free=free)
    few, many = Cell((2,)), Cell((2, 5, 6))
    found = solved(bench, [Problem(few, 3, 0), Problem(many, 3, 1)])
    assert found[0].perturbation.shape == (1, 32)
    assert found[1].perturbation.shape == (3, 32)
    for each in found:
        assert (each.perturbation[:, 10:] == 0.0).all()
        assert (each.perturbation[:, :10] != 0.0).all()


def test_at_layer_0_it_is_the_same_as_changed_input_embeddings():
    module = tiny_model("gpt2")
    bench = bench_of(wb.wrap(module))
    problem = Problem(Cell((1, 4)), 5, 0)
    change = torch.randn(2, 32)
    tokens = torch.cat([bench.cases.contexts[0], bench.cases.targets[0, :4]])[None]
    embeds = module.transformer.wte(tokens).detach().clone()
    embeds[0, [1, 4]] += change
    with torch.no_grad():
        logits = module(inputs_embeds=embeds).logits[0, 7:]
    wanted = torch.nn.functional.cross_entropy(logits, bench.cases.targets[0])
    n_correct = int((logits.argmax(-1) == bench.cases.targets[0]).sum())
    found = verify(bench, problem, Reached(change, 0, 0.0, 0))
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert found.n_correct == n_correct
    norm = bench.resid[0, [1, 4]].norm()
    assert found.norm_ratio == pytest.approx(float(change.norm() / norm))


# What it reaches


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        *((family, 0) for family in MODELS),
        ("gpt2", 1),
        *(pytest.param(family, 1, marks=pytest.mark.slow) for family in MODELS if family != "gpt2"),
    ],
)
def test_one_token_is_forced_and_generation_says_it(family, layer):
    model = MODELS[family]()
    bench = bench_of(model, layer=layer)
    problems = [Problem(Cell((0, 7)), t, row) for t in (1, 2) for row in range(3)]
    found = solved(bench, problems, Descent(steps=150))
    forced = [outcome.n_correct == p.n_target for p, outcome in zip(problems, found, strict=True)]
    assert sum(forced) >= 3
    assert all(agrees_with_generation(bench, problems, found))
    index = forced.index(True)
    problem, outcome = problems[index], found[index]
    edit = PerturbPositions(
        layer, torch.tensor([problem.cell.positions]), outcome.perturbation[None], 8
    )
    context = bench.cases.contexts[problem.row][None]
    with model.edit(edit):
        said = generate_greedily(model, context, problem.n_target)
    assert torch.equal(said[0], bench.cases.targets[problem.row, : problem.n_target])
    assert not torch.equal(said, generate_greedily(model, context, problem.n_target))


def test_an_outcome_that_generation_contradicts_is_noticed():
    bench = bench_of(MODELS["gpt2"]())
    problems = [Problem(Cell((7,)), 2, row) for row in range(3)]
    found = solved(bench, problems, Descent(steps=150))
    assert all(agrees_with_generation(bench, problems, found))
    lies = [outcome._replace(is_argmax=not outcome.is_argmax) for outcome in found]
    assert not any(agrees_with_generation(bench, problems, lies))
    no_change = [
        outcome._replace(perturbation=torch.zeros(1, 32), is_argmax=True) for outcome in found
    ]
    assert not any(agrees_with_generation(bench, problems, no_change))


@pytest.mark.parametrize("family", list(MODELS))
def test_batch_and_alone_and_prefix_and_whole_pass_find_the_same(family, monkeypatch):
    bench = bench_of(MODELS[family](), n_rows=3)
    problems = [Problem(Cell((5, 7)), t, row) for t in (3, 4) for row in range(3)]
    descent = Descent(steps=6)
    together = solved(bench, problems, descent)
    alone = [solved(bench, [problem], descent)[0] for problem in problems]
    monkeypatch.setattr("probes.activation_attacks_bench.prefix_of", lambda *_: None)
    whole = solved(bench, problems, descent)
    for one, *others in zip(together, alone, whole, strict=True):
        for other in others:
            assert one.n_correct == other.n_correct
            torch.testing.assert_close(one.perturbation, other.perturbation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", list(MODELS))
def test_the_search_and_the_fresh_pass_see_the_same_perturbation(family, monkeypatch):
    pairs = []

    def recorded(bench, problem, reached):
        outcome = verify(bench, problem, reached)
        pairs.append((reached, outcome))
        return outcome

    monkeypatch.setattr("probes.activation_attacks_solve.verify", recorded)
    bench = bench_of(MODELS[family]())
    problems = [Problem(Cell(places), 4, row) for places in ((5, 7), (6,)) for row in range(3)]
    solved(bench, problems, Descent(steps=8))
    assert len(pairs) == 6
    for reached, outcome in pairs:
        assert outcome.loss == pytest.approx(reached.loss, rel=1e-3, abs=1e-4)
        assert reached.perturbation.abs().max() > 0.1


def test_the_prefix_is_run_once_and_passes_begin_behind_it(monkeypatch):
    model = MODELS["gpt2"]()
    bench = bench_of(model)
    lengths, prefixes = [], []
    run, make = model.continue_from, model.prefix
    monkeypatch.setattr(
        model,
        "continue_from",
        lambda layer, resid, **k: lengths.append(resid.shape[1]) or run(layer, resid, **k),
    )
    monkeypatch.setattr(
        model, "prefix", lambda tokens: prefixes.append(tokens.shape) or make(tokens)
    )
    solved(bench, [Problem(Cell((6,)), 4, row) for row in range(3)], Descent(steps=4))
    assert prefixes == [(3, 6)]
    searched, fresh = lengths[:-3], lengths[-3:]
    assert set(searched) == {8 + 4 - 1 - 6}
    assert fresh == [8 + 4 - 1] * 3


def test_a_bounded_perturbation_stays_within():
    bench = bench_of(MODELS["gpt2"]())
    problem = Problem(Cell((2, 7)), 4, 0)
    for norm, order in (("l2", 2), ("linf", math.inf)):
        found = solved(bench, [problem], Descent(steps=10, norm=norm, bound=0.05))[0]
        norms = torch.linalg.vector_norm(found.perturbation, order, dim=-1)
        assert (norms <= 0.05 * 1.0001).all()
        assert (norms > 0.04).any()


def test_nothing_is_found_where_nothing_can_be_done():
    result = measure_activation_attacks(MODELS["gpt2"](), NO_DATA, small(bound=1e-7))
    assert result.t_max.tolist() == [0.0, 0.0]
    assert (result.example_target == -1).all()
    assert (result.example_perturbation == 0.0).all()
    metrics = result.metrics()
    assert metrics["kappa"] == 0.0
    assert "chi" not in metrics
    assert "exponent" not in metrics


def test_outcomes_are_judged_strictly():
    bench = bench_of(MODELS["gpt2"]())
    problem = Problem(Cell((7,)), 1, 0)
    (found,) = solved(bench, [problem], Descent(steps=100))
    strict = make_bench(bench.model, 0, Cases(*vars(bench.cases).values()), bench.masks)
    object.__setattr__(strict, "margin", 1e6)
    again = verify(strict, problem, Reached(found.perturbation, 1, 0.0, 0))
    assert isinstance(again, Outcome)
    assert (found.n_correct, again.n_correct) == (1, 0)
    assert again.is_argmax
