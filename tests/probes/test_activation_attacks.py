"""Activation attacks on models: what is forced, what is left alone, what is refused."""

import math

import pytest
import torch

import workbench as wb
from probes.activation_attacks import ActivationAttackConfig, measure_activation_attacks
from probes.activation_attacks_bench import (
    Cell,
    Outcome,
    Problem,
    make_bench,
    pass_bytes,
    perturbed,
    problems_at_once,
    similar_lengths,
    solve,
    verify,
)
from probes.activation_attacks_cases import (
    Cases,
    attacked_positions,
    dimension_mask,
    draw_cases,
    refuse_without_gradients,
)
from probes.activation_attacks_optimise import Descent, Reached
from probes.activation_attacks_replay import (
    PerturbPositions,
    agrees_with_generation,
    generate_greedily,
)
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import D_VOCAB, FAMILIES, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.toy import ToyAdapter
from workbench.store.pieces import Pieces

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

NO_DATA = torch.zeros(0, 0, dtype=torch.long)
SMALL = {"n_attacked": (1, 2), "context": 8, "n_seeds": 2, "steps": 25, "t_limit": 6}


def small(**changes):
    return ActivationAttackConfig(**{**SMALL, "token_attack": False, **changes})


def toy():
    config = ToyModelConfig(d_vocab=37, n_layers=2, n_heads=2, d_model=16, n_ctx=32)
    return ToyAdapter(make_model(config, 0))


MODELS = {
    "gpt2": lambda: wb.wrap(tiny_model("gpt2")),
    "gemma2": lambda: wb.wrap(tiny_model("gemma2")),
    "mamba": lambda: wb.wrap(tiny_model("mamba")),
    "toy": toy,
}
"""Learned positions; rotary with windows; no attention, so no prefix; no cache."""


def bench_of(model, n_rows=3, n_context=8, n_target=5, layer=0, free=None):
    config = small(n_seeds=n_rows, context=n_context, t_limit=n_target)
    cases = draw_cases(model, NO_DATA, config, Context())
    free = torch.ones(model.spec.d_model) if free is None else free
    return make_bench(model, layer, cases, {1.0: free})


def solved(bench, problems, descent=None):
    found = {}
    solve(bench, problems, descent or Descent(steps=40), found.__setitem__)
    return [found[problem] for problem in problems]


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


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("layer", [0, 1])
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

    monkeypatch.setattr("probes.activation_attacks_bench.verify", recorded)
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


# The whole probe


@pytest.mark.parametrize("family", ["gpt2", "toy"])
def test_the_whole_probe_and_its_example_replayed(family):
    model = MODELS[family]()
    config = small(
        steps=60, fractions=(0.5,), token_attack=True, token_limit=2, positions="last", shortlist=8
    )
    result = measure_activation_attacks(model, NO_DATA, config)
    assert result.t_max[1] > 0
    metrics = result.metrics()
    a, t = result.n_attacked.double(), result.t_max.double()
    assert metrics["kappa"] == pytest.approx(float((a * t).sum() / (a * a).sum()))
    assert metrics["kappa_low"] <= metrics["kappa"] <= metrics["kappa_high"]
    bits_out = metrics["kappa"] * math.log2(model.spec.d_vocab)
    assert metrics["chi"] == pytest.approx(model.spec.d_model * 16 / bits_out)
    assert metrics["generation_agreement"] == 1.0
    assert result.fraction.tolist() == [0.5]
    assert result.t_max_tokens.shape == (2,)
    measured = ~result.success.isnan()
    assert torch.equal(measured, ~result.n_steps.isnan())
    assert result.example_positions.tolist() == [[7, -1], [6, 7]]
    row = 1  # as the page shows
    taken = result.example_positions[row] >= 0
    target = result.example_target[row]
    target = target[target >= 0]
    edit = PerturbPositions(
        0,
        result.example_positions[row][taken][None],
        result.example_perturbation[row][taken][None],
        8,
    )
    with model.edit(edit):
        said = generate_greedily(model, result.example_context[row][None], len(target))
    assert torch.equal(said[0], target)


def test_it_runs_under_interventions_of_others():
    from workbench.interventions.base import ZeroHeads

    model = MODELS["gpt2"]()
    with model.edit(ZeroHeads(((0, 1), (1, 2)))):
        result = measure_activation_attacks(model, NO_DATA, small(positions="last"))
    assert result.metrics()["generation_agreement"] == 1.0


def test_the_two_definitions_read_the_same_shares():
    model = MODELS["gpt2"]()
    both = [
        measure_activation_attacks(model, NO_DATA, small(definition=name))
        for name in ("per-token", "all-correct")
    ]
    assert torch.equal(both[0].success.nan_to_num(-1), both[0].accuracy.nan_to_num(-1))
    whole = (both[1].accuracy == 1.0).float()
    measured = ~both[1].success.isnan()
    assert torch.equal(both[1].success[measured], whole[measured])
    assert (both[0].t_max >= both[1].t_max).all()


def test_prompts_give_contexts_and_targets():
    model = MODELS["gpt2"]()
    prompts = random_tokens(2, 12)
    found = draw_cases(model, prompts, small(), Context())
    assert torch.equal(found.contexts, prompts[:, :8])
    text = draw_cases(model, prompts, small(targets="text", t_limit=4), Context())
    assert torch.equal(text.targets, prompts[:, 8:12])
    with pytest.raises(DataError, match=r"at least 14 tokens.*shortest has 12"):
        draw_cases(model, prompts, small(targets="text"), Context())
    with pytest.raises(DataError, match=r"n_seeds = 3 prompts; got 2"):
        draw_cases(model, prompts, small(n_seeds=3), Context())
    with pytest.raises(DataError, match="needs prompts"):
        draw_cases(model, NO_DATA, small(targets="text"), Context())


def test_positions_of_a_smaller_a_are_among_those_of_a_larger():
    generator = Context().generator
    for positions in ("first", "last", "random", "5,1,7"):
        chosen = [attacked_positions(small(positions=positions), a, generator()) for a in (1, 2, 3)]
        assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
        assert all(list(places) == sorted(places) for places in chosen)
    assert chosen == [(5,), (1, 5), (1, 5, 7)]
    assert attacked_positions(small(positions="last"), 2, generator()) == (6, 7)


def test_shares_of_dimensions_are_of_the_listed_ones():
    generator = Context().generator
    mask = dimension_mask(32, small(dimensions=tuple(range(20))), 0.5, generator())
    assert mask.sum() == 10
    assert (mask[20:] == 0.0).all()
    assert torch.equal(
        mask, dimension_mask(32, small(dimensions=tuple(range(20))), 0.5, generator())
    )
    with pytest.raises(ConfigError, match="below d_model = 32; got 40"):
        dimension_mask(32, small(dimensions=(40,)), 1.0, generator())
    with pytest.raises(ConfigError, match="at least one of 4 dimensions"):
        dimension_mask(32, small(dimensions=(0, 1, 2, 3)), 0.1, generator())


# Long runs


def test_a_killed_run_goes_on_with_what_had_ended(tmp_path):
    model, config = MODELS["gpt2"](), small()
    pieces = Pieces(tmp_path, "0" * 64)
    computed = []

    def keep(name, compute, *, stop_after=10**9):
        def counted():
            part = compute()
            computed.append(name)
            return part

        found = pieces.get_or_compute(name, counted)
        if len(computed) >= stop_after:
            raise KeyboardInterrupt
        return found

    whole = measure_activation_attacks(model, NO_DATA, config)
    with pytest.raises(KeyboardInterrupt):
        measure_activation_attacks(
            model, NO_DATA, config, Context(keep=lambda n, c: keep(n, c, stop_after=5))
        )
    first = list(computed)
    assert len(first) == 5
    computed.clear()
    again = measure_activation_attacks(model, NO_DATA, config, Context(keep=keep))
    assert not set(first) & set(computed)
    assert len(first) + len(computed) == whole.metrics()["n_problems"]
    assert again.metrics() == whole.metrics()
    torch.testing.assert_close(again.example_perturbation, whole.example_perturbation)


def test_it_says_where_it_stands():
    lines, progress = [], []
    config = small(token_attack=True, token_limit=1, shortlist=4)
    context = Context(status=lines.append, progress=lambda *done: progress.append(done))
    result = measure_activation_attacks(MODELS["gpt2"](), NO_DATA, config, context)
    assert any(line.startswith("activations: ") for line in lines)
    assert any(line.startswith("tokens: ") for line in lines)
    assert any("best loss" in line and "s left" in line for line in lines)
    last = [line for line in lines if line.startswith("activations: ")][-1]
    forced = int((result.accuracy == 1.0).sum())
    assert f"{forced} of {result.metrics()['n_problems']:.0f} solved" in last
    assert progress[-1][0] == progress[-1][1]


def test_passes_fit_the_budget():
    bench = bench_of(MODELS["gpt2"](), n_rows=3)
    group = [Problem(Cell((6,)), 4, row) for row in range(3)] * 40
    one = pass_bytes(bench.model.spec, 8 + 4 - 1 - 6, 4)
    for n in (1, 7, 50):
        tight = make_bench(bench.model, 0, bench.cases, bench.masks)
        object.__setattr__(tight, "budget_bytes", n * one + one // 2)
        assert problems_at_once(tight, group) == n
    object.__setattr__(tight, "at_most", 3)
    assert problems_at_once(tight, group) == 3
    object.__setattr__(tight, "budget_bytes", 1)
    assert problems_at_once(tight, group) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "mamba", "toy"])
def test_the_estimate_of_a_pass_is_from_above(family):
    model = toy() if family == "toy" else wb.wrap(tiny_model(family))
    n, n_pos, n_target = 4, 20, 6
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    resid = torch.randn(n, n_pos, model.spec.d_model).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.continue_from(0, resid, last=n_target).logsumexp(-1).sum()
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    needed = sum(size for place, size in kept.items() if place not in weights)
    loss.backward()
    assert 0.1 < needed / (n * pass_bytes(model.spec, n_pos, n_target)) <= 1.0


def test_out_of_memory_makes_smaller_passes(monkeypatch):
    model, sizes = MODELS["gpt2"](), []
    run = model.continue_from

    def small_machine(layer, resid, **options):
        if len(resid) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(resid))
        return run(layer, resid, **options)

    wanted = measure_activation_attacks(model, NO_DATA, small(n_seeds=4))
    monkeypatch.setattr(model, "continue_from", small_machine)
    found = measure_activation_attacks(model, NO_DATA, small(n_seeds=4))
    assert max(sizes) == 2
    assert found.metrics() == pytest.approx(wanted.metrics())


def test_problems_of_similar_length_go_together():
    lengths = [1, 2, 3, 4, 5, 8, 9, 16]
    groups = similar_lengths([Problem(Cell((0,)), t, 0) for t in lengths])
    assert [[p.n_target for p in group] for group in groups] == [[16, 9], [8, 5], [4, 3], [2], [1]]


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_attacked": (0, 1)},
            r"n_attacked must be ascending numbers of at least 1; got \(0, 1\)",
        ),
        ({"n_attacked": (4, 2)}, "ascending"),
        ({"n_attacked": (9,)}, "at most the context, 8 tokens; got 9"),
        ({"positions": "middle"}, "first, last, random or a list"),
        ({"positions": "1"}, "2 different positions"),
        ({"positions": "1,8"}, "0 ... 7"),
        ({"fractions": (1.5,)}, "fractions must lie in"),
        ({"dimensions": (1, 1)}, "dimensions must be different"),
        ({"context": 1, "n_attacked": (1,)}, "context must be at least 2"),
        ({"bound": 0.0}, "bound must be above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_what_does_not_fit_the_model_is_refused():
    model = MODELS["gpt2"]()  # n_ctx 64
    with pytest.raises(ConfigError, match=r"n_ctx = 64 tokens.*got 60 \+ 6"):
        measure_activation_attacks(model, NO_DATA, small(context=60))
    with pytest.raises(ConfigError, match=r"got 64 \+ 1"):
        measure_activation_attacks(model, NO_DATA, small(context=64, t_limit=None))
    with pytest.raises(ConfigError, match="layer must be below 2"):
        measure_activation_attacks(model, NO_DATA, small(layer=2))
    prompts = random_tokens(2, 20)
    prompts[1, 10] = D_VOCAB
    with pytest.raises(DataError, match=r"target ids must lie in 0 \.\.\. 100.*got 101 in row 1"):
        draw_cases(model, prompts, small(targets="text"), Context())


def test_tied_targets_are_refused_and_never_drawn():
    module = tiny_model("gpt2")
    with torch.no_grad():
        module.transformer.wte.weight[50:] = module.transformer.wte.weight[50]
    model = wb.wrap(module)
    prompts = random_tokens(2, 20) % 40 + 3
    prompts[1, 9] = 77
    with pytest.raises(DataError, match=r"token 77 \(row 1\) equals that of another token.*tied"):
        draw_cases(model, prompts, small(targets="text"), Context())
    drawn = draw_cases(model, NO_DATA, small(n_seeds=9), Context())
    assert (drawn.targets < 50).all()
    assert (drawn.contexts >= 50).any()
    with torch.no_grad():
        module.transformer.wte.weight[:] = module.transformer.wte.weight[50]
    with pytest.raises(DataError, match="lower distinct"):
        draw_cases(model, NO_DATA, small(), Context())


def test_two_tokens_have_no_per_token_half():
    config = ToyModelConfig(d_vocab=2, n_layers=1, n_heads=2, d_model=8, n_ctx=32)
    model = ToyAdapter(make_model(config, 0))
    with pytest.raises(ConfigError, match="definition=all-correct"):
        measure_activation_attacks(model, NO_DATA, small())
    measure_activation_attacks(model, NO_DATA, small(definition="all-correct", steps=5))


class _Int8Linear(torch.nn.Module):
    """As int8 kernels do it: integers in between, and no gradient."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("whole", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        x = x.detach()
        step = x.abs().max() / 127
        rounded = (x / step).round().to(torch.int8)
        return (rounded.int() @ self.whole.int().T).float() * step * self.scale


@pytest.mark.parametrize("inside", [False, True], ids=["unembedding", "an MLP"])
def test_int8_without_gradients_is_refused_with_who_could(inside):
    module = tiny_model("llama")
    if inside:  # the residual stream goes around it, so a gradient there is, but a wrong one
        for block in module.model.layers:
            block.mlp.down_proj = _Int8Linear(block.mlp.down_proj)
    else:
        module.lm_head = _Int8Linear(module.lm_head)
    with pytest.raises(CapabilityError, match=r"gives none.*--backend hf --dtype float32.*int8"):
        measure_activation_attacks(wb.wrap(module), NO_DATA, small())


@pytest.mark.parametrize("family", [*FAMILIES, "toy"])
def test_no_float_model_is_refused(family):
    model = toy() if family == "toy" else wb.wrap(tiny_model(family))
    for layer in range(2):
        refuse_without_gradients(model, layer)


@pytest.mark.parametrize("through", [through_bridge, through_nnsight], ids=["bridge", "nnsight"])
def test_backends_without_gradients_are_refused_with_who_has_them(through):
    model = through(tiny_model("gpt2", attn_implementation="eager"))
    with pytest.raises(CapabilityError, match=r"gradients .*--backend hf"):
        wb.run("activation-attacks", model, **SMALL)


def test_the_command_line_of_python(tmp_path):
    model = MODELS["gpt2"]()
    result = wb.run("activation-attacks", model, store=tmp_path, token_attack=False, **SMALL)
    again = wb.run("activation-attacks", model, store=tmp_path, token_attack=False, **SMALL)
    assert again.cached
    assert again.metrics() == result.metrics()
    assert result.provenance["model"] == model.spec.name
    assert again.measured.chi(result.metrics()["kappa"]) == pytest.approx(result.metrics()["chi"])


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
