"""Heads and models of one layer under the bound, against the same worked out token by token."""

import math

import pytest
import torch

import probes.reachability_bounded as bounded
import workbench as wb
from probes.reachability_bounded import excluded_pairs, head_bounds, view_last, vocabulary_reach
from probes.reachability_problems import Problem, State
from tests.zoo import D_VOCAB, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.models.toy import ToyAdapter

NO_BOS = torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def models():
    return {name: wb.wrap(tiny_model(name)) for name in ("gpt2", "llama", "gemma2")}


def read(model, row, *names):
    """What layer 0 makes of one row of ids, without the batch axis."""
    found = model.capture(torch.tensor([row]), [f"L0.{name}" for name in names])
    return [found[f"L0.{name}"][0].float() for name in names]


# What a token can be


@pytest.mark.parametrize("packed", [7, 64, 1000], ids=["in parts", "as it is", "one row"])
def test_reach_is_the_longest_key_and_value_of_any_token(models, packed, monkeypatch):
    monkeypatch.setattr(bounded, "PACKED", packed)
    monkeypatch.setattr(bounded, "READ_AT_ONCE", 2 * packed)
    model = models["llama"]
    key, value = torch.zeros(2), torch.zeros(2)
    for token in range(D_VOCAB):
        k, v = read(model, [token], "k", "v")
        key, value = key.maximum(k[0].norm(dim=-1)), value.maximum(v[0].norm(dim=-1))
    reach = vocabulary_reach(model, range(3))
    # Two query heads a key head; a little above, never below.
    for found, exact in ((reach.key, key), (reach.value, value)):
        ratio = found / exact.repeat_interleave(2)
        assert (ratio > 1.0).all()
        torch.testing.assert_close(ratio, torch.full((4,), 1.0001), rtol=2e-5, atol=0)


def test_reading_the_vocabulary_keeps_to_so_many_tokens_a_pass_and_misses_none(models, monkeypatch):
    monkeypatch.setattr(bounded, "PACKED", 8)
    monkeypatch.setattr(bounded, "READ_AT_ONCE", 20)
    model, seen = models["llama"], []
    run = model.capture
    monkeypatch.setattr(model, "capture", lambda rows, *a: seen.append(rows) or run(rows, *a))
    vocabulary_reach(model, [0])
    assert [tuple(rows.shape) for rows in seen] == [(2, 8)] * 6 + [(1, 8)]
    # 101 tokens in rows of 8: the last row is filled up from the beginning.
    assert torch.cat(seen).flatten().tolist() == [*range(101), 0, 1, 2]


def test_learned_positions_count_at_the_places_a_control_can_take(models):
    model, places = models["gpt2"], (1, 4)
    exact = torch.zeros(4)
    for token in range(D_VOCAB):
        (k,) = read(model, [token] * 5, "k")
        exact = exact.maximum(k[list(places)].norm(dim=-1).amax(dim=0))
    reach = vocabulary_reach(model, places)
    torch.testing.assert_close(reach.key, 1.0001 * exact)


# What the last position sees


@pytest.mark.parametrize("bos", [(), (0,)], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_view_is_the_attention_of_the_last_query_summed_by_hand(models, family, bos):
    model, control, body = models[family], [50, 51], [5, 9, 33]
    state = State(torch.tensor(bos, dtype=torch.long), torch.tensor(body), 0)
    reach = vocabulary_reach(model, range(4))
    view = view_last(model, state, torch.tensor(control), reach)
    row = [*bos, *control, *body]
    q, k, v = read(model, row, "q", "k", "v")
    d_head, per_key = q.shape[-1], q.shape[1] // k.shape[1]
    kept = [at for at in range(len(row)) if not len(bos) <= at < len(bos) + 2]
    for head in range(4):
        keys, values = k[:, head // per_key], v[:, head // per_key]
        weights = [math.exp(q[-1, head] @ key / math.sqrt(d_head)) for key in keys]
        total = sum(weights[at] for at in kept)
        assert view.log_d[head].item() == pytest.approx(math.log(total), rel=1e-4)
        own = sum(weights[at] / total * values[at] for at in kept)
        whole = sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True))
        torch.testing.assert_close(view.own[head], own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.whole[head], whole, rtol=1e-4, atol=1e-5)
        alpha = q[-1, head].norm() * reach.key[head] / math.sqrt(d_head)
        assert view.alpha[head].item() == pytest.approx(alpha.item(), rel=1e-4)


def test_capped_scores_are_no_multiples_so_nothing_is_said(models):
    model = models["gemma2"]
    problems = problems_of(model, [[5, 9, 33]], [7])
    found = head_bounds(model, problems, torch.tensor([0]), [NO_BOS], Context())
    assert found == {}
    reach = vocabulary_reach(model, range(1))
    assert view_last(model, problems[0].state, torch.tensor([4]), reach) is None


# Heads of a real model


def problems_of(model, states, targets, bos=()):
    states = [
        State(torch.tensor(bos, dtype=torch.long), torch.tensor(state), index)
        for index, state in enumerate(states)
    ]
    pairs = [(state, target) for state in states for target in targets]
    return [Problem(state, target, index) for index, (state, target) in enumerate(pairs)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bounds_of_heads_against_their_formulas(models, family):
    model = models[family]
    with_bos = problems_of(model, [[5, 9, 33]], [7, 60], bos=(0,))
    without = [Problem(State(NO_BOS, torch.tensor([8, 12]), 1), 7, 2)]
    problems, prompts = [*with_bos, *without], [[50, 51], [], [40]]
    k = torch.tensor([2, -1, 1])
    prompts = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    found = head_bounds(model, problems, k, prompts, Context())
    # BOS and the longest control: three places.
    reach = vocabulary_reach(model, range(3))
    for at, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        view = view_last(model, problem.state, prompt, reach)
        (value,) = read(model, [*problem.state.bos.tolist(), problem.target], "v")
        for head in range(4):
            own, whole = view.own[head].double(), view.whole[head].double()
            wanted = value[-1, head * value.shape[1] // 4].double()

            def turned(x, own=own):
                return float((x - (x @ own) / (own @ own) * own).norm())

            longest, ratio = reach.value[head].item(), math.exp(view.alpha[head] - view.log_d[head])
            most = longest * len(prompt) * ratio / (1 + len(prompt) * ratio)
            assert found["head_orthogonal"][at, head].item() == pytest.approx(
                turned(whole), rel=1e-3, abs=1e-4
            )
            assert found["head_limit"][at, head].item() == pytest.approx(most, rel=1e-4)
            needed = turned(wanted) / (ratio * (longest - turned(wanted)))
            fewest = math.ceil(needed * (1 - 1e-5))
            assert found["head_min_k"][at, head] == fewest


def toy(seed=0, write=0.3, **changes):
    """One layer of attention, whose heads write unequally much."""
    settings = {"d_vocab": 10, "n_ctx": 8, "n_layers": 1, "n_heads": 2, "d_model": 12, "d_mlp": 0}
    model = make_model(ToyModelConfig(**{**settings, "positions": "rotary", **changes}), seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.W_O.weight.mul_(write)
            block.attention.W_O.weight[:, :6].mul_(0.3)
        model.embed.weight.mul_(3.0)
    return ToyAdapter(model.requires_grad_(False))


@pytest.mark.parametrize(
    "changes", [{"bias": "key-value"}, {"attention": "relu"}], ids=["bias", "kernel"]
)
def test_toys_with_further_keys_or_other_weights_are_left_alone(changes):
    model = toy(**changes)
    problems = problems_of(model, [[1, 2, 3]], range(10))
    assert head_bounds(model, problems[:1], torch.tensor([0]), [NO_BOS], Context()) == {}
    assert not excluded_pairs(model, problems, 1, Context()).any()
    plain = toy()
    assert head_bounds(plain, problems[:1], torch.tensor([0]), [NO_BOS], Context())
    assert excluded_pairs(plain, problems, 1, Context()).any()


@pytest.mark.parametrize(
    "changes",
    [{"n_layers": 2}, {"d_mlp": 8}, {"norm": "post"}],
    ids=["two layers", "an MLP", "a norm behind the sum"],
)
def test_only_a_single_layer_that_adds_up_is_bounded_as_a_whole(changes):
    model = toy(write=0.0, **changes)
    found = excluded_pairs(model, problems_of(model, [[1, 2, 3]], range(10)), 1, Context())
    assert not found.any()


# A whole model of one layer of attention


def could_win(model, state, k_max, places):
    """The targets that the bound leaves, one rival at a time, in float64."""
    reach = vocabulary_reach(model, places)
    weight = model.model.ln_final.weight.double()
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    readout = centre @ torch.diag(weight) @ model.weight("W_U").double()
    w_o = model.weight("W_O", 0).double()
    left = set()
    for k in range(k_max + 1):
        control = state.tokens[:1].expand(k)
        view = view_last(model, state, control, reach)
        row = state.rows(control[None])
        end = model.capture(row, ["L0.resid_post"])["L0.resid_post"][0, -1].double()
        rest = end - sum(view.whole[head].double() @ w_o[head] for head in range(2))
        ratio = (view.alpha - view.log_d).exp().double()
        limits = reach.value.double() * k * ratio / (1 + k * ratio)
        for target in range(10):
            others = [v for v in range(10) if v != target]
            directions = [readout[:, target] - readout[:, v] for v in others]
            # Scaling by the final norm changes no sign; the best for each rival.
            most = [
                rest @ d
                + sum(
                    max(0.0, float(view.own[h].double() @ w_o[h] @ d))
                    + limits[h] * (w_o[h] @ d).norm()
                    for h in range(2)
                )
                for d in directions
            ]
            if min(most) >= 0:
                left.add(target)
    return left


@pytest.mark.parametrize("k_max", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_excluded_is_what_the_formula_excludes(seed, k_max):
    model = toy(seed, write=(0.1, 0.3, 0.6, 1.0)[seed])
    problems = problems_of(model, [[1, 2, 3], [7, 5]], range(10))
    found = excluded_pairs(model, problems, k_max, Context())
    for number in range(2):
        own = [p for p in problems if p.state.index == number]
        left = could_win(model, own[0].state, k_max, range(k_max or 1))
        assert {p.target for p in own if not found[p.index]} == left


def test_the_last_place_of_the_longest_control_counts():
    # Learned positions: what stands behind BOS and two tokens is longer than anything else.
    model = toy(positions="learned", write=0.2)
    with torch.no_grad():
        model.model.position.weight[2].mul_(300.0)
    short = [
        Problem(State(NO_BOS, torch.tensor([7, 5]), 0), target, target) for target in range(10)
    ]
    long = [
        Problem(State(torch.tensor([0]), torch.tensor([1, 2]), 1), target, 10 + target)
        for target in range(10)
    ]
    context = Context()
    found = excluded_pairs(model, [*short, *long], 2, context)
    for problems, at in ((short, 0), (long, 10)):
        left = could_win(model, problems[0].state, 2, range(3))
        assert {t for t in range(10) if not found[at + t]} == left


def test_a_model_whose_norm_cannot_be_read_or_adds_a_bias_is_not_bounded():
    problems = problems_of(None, [[1, 2, 3]], range(10))
    biased, hidden = toy(write=0.0), toy(write=0.0)
    assert excluded_pairs(toy(write=0.0), problems, 1, Context()).sum() == 9
    with torch.no_grad():
        biased.model.ln_final.bias.add_(0.1)
    assert not excluded_pairs(biased, problems, 1, Context()).any()
    hidden.final_norm = None
    assert not excluded_pairs(hidden, problems, 1, Context()).any()
