"""The whole probe: its numbers, its examples, and runs that are long, killed or short of memory."""

import math

import pytest
import torch

import workbench as wb
from probes.activation_attacks import measure_activation_attacks
from probes.activation_attacks_bench import (
    N_STATES,
    Cell,
    Problem,
    make_bench,
    problems_at_once,
    similar_lengths,
)
from probes.activation_attacks_cases import (
    attacked_positions,
    dimension_mask,
    draw_cases,
)
from probes.activation_attacks_replay import (
    PerturbPositions,
    generate_greedily,
)
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.attacked_models import MODELS, NO_DATA, bench_of, small, toy
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import ConfigError, DataError
from workbench.models.memory import gradient_bytes
from workbench.store.pieces import Pieces

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

# The whole probe


@pytest.mark.parametrize("family", ["gpt2", pytest.param("toy", marks=pytest.mark.slow)])
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
    from workbench.interventions.zero_heads import ZeroHeads

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
    problems = [name for name in first + computed if name.startswith("at-")]
    assert len(problems) == whole.metrics()["n_problems"]
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
    one = gradient_bytes(bench.model.spec, 5, 4, 6) + 4 * N_STATES * 32
    for n in (1, 7, 50):
        tight = make_bench(bench.model, 0, bench.cases, bench.masks)
        object.__setattr__(tight, "budget_bytes", n * one + one // 2)
        assert problems_at_once(tight, group) == n
    object.__setattr__(tight, "at_most", 3)
    assert problems_at_once(tight, group) == 3
    object.__setattr__(tight, "budget_bytes", 1)
    assert problems_at_once(tight, group) == 1


def test_memory_rows_and_margin_are_those_that_were_set(monkeypatch):
    given = []

    def begin(bench, config, context):
        given.append((bench.budget_bytes, bench.at_most, bench.margin))
        raise KeyboardInterrupt

    monkeypatch.setattr("probes.activation_attacks.Campaign", begin)
    config = small(memory_mb=3, margin=0.125)
    with pytest.raises(KeyboardInterrupt):
        measure_activation_attacks(MODELS["gpt2"](), NO_DATA, config, Context(batch_size=7))
    assert given == [(3 * 1024 * 1024, 7, 0.125)]


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
    assert 0.1 < needed / (n * gradient_bytes(model.spec, n_pos, n_target)) <= 1.0


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
