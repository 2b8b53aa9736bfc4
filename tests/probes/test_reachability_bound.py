"""The self-attention bound: sound on random systems and real heads, and sharp where it must be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.reachability import ReachabilityConfig, measure_reachability
from probes.reachability_bound import limit, minimal_k, orthogonal_part
from probes.reachability_bounded import excluded_pairs, view_last, vocabulary_reach
from probes.reachability_problems import Problem, State
from tests.zoo import tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.models.toy import ToyAdapter

N_SYSTEMS = 4000


def random_system(generator):
    """Outputs of a head without a mask, with k control tokens and without; its sizes as the card's."""
    d, d_k, n_state, k = (int(torch.randint(2, 6, (1,), generator=generator)) for _ in range(4))

    def draw(*shape):
        scale = 0.2 + 1.5 * torch.rand(1, generator=generator)
        return torch.randn(*shape, generator=generator) * scale

    state, control = draw(n_state, d), draw(k, d)
    w_q, w_k, w_v = draw(d, d_k), draw(d, d_k), draw(d, d_k)
    both = torch.cat([control, state])
    scores = (state @ w_q) @ (both @ w_k).T / math.sqrt(d_k)
    own_scores = scores[:, k:]
    return {
        "k": k,
        "made": scores.softmax(-1) @ (both @ w_v),
        "own": own_scores.softmax(-1) @ (state @ w_v),
        "log_d": own_scores.logsumexp(-1),
        # M_x sigma_q sigma_k M_u / sqrt(d_k), for every query.
        "alpha": (longest(state) * longest(control) * sigma(w_q) * sigma(w_k) / d_k**0.5).expand(
            n_state
        ),
        "value": (sigma(w_v) * longest(control)).expand(n_state),
        "sigma_q": sigma(w_q) * longest(control),
    }


def sigma(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def longest(rows):
    return rows.norm(dim=-1).max()


def too_long(wanted, own, limits):
    """Whether some query's orthogonal part is beyond its limit by more than float32 rounds."""
    length = orthogonal_part(wanted, own).norm(dim=-1)
    return bool((length > limits + 1e-5 * (wanted.norm(dim=-1) + limits)).any())


@pytest.fixture(scope="module")
def systems():
    generator = torch.Generator().manual_seed(0)
    return [random_system(generator) for _ in range(N_SYSTEMS)]


def test_what_a_system_does_write_is_never_excluded(systems):
    ratios = []
    for s in systems:
        limits = limit(s["k"], s["log_d"], s["alpha"], s["value"])
        assert not too_long(s["made"], s["own"], limits)
        ratios.append((orthogonal_part(s["made"], s["own"]).norm(dim=-1) / limits).max().item())
    # A bound far above everything would pass too: some systems come near it.
    assert 0.6 < max(ratios) <= 1.0


def test_minimal_k_is_never_above_the_k_that_did_it(systems):
    for s in systems:
        length = orthogonal_part(s["made"], s["own"]).norm(dim=-1)
        fewest = minimal_k(length, s["log_d"], s["alpha"], s["value"])
        assert ((fewest >= 0) & (fewest <= s["k"])).all()


def test_the_printed_theorem_excludes_what_systems_do_write(systems):
    # Version 3, theorem 1, as printed: <y*, yhat> <= 0 and |y* - D/(D + k e^alpha) yhat| <=
    # sigma_q M_u. Inequality and matrix are misprints: this is why we do not implement it.
    false = 0
    for s in systems:
        share = torch.sigmoid(s["log_d"] - s["alpha"] - math.log(s["k"]))
        distance = (s["made"] - share[:, None] * s["own"]).norm(dim=-1)
        turned = (s["made"] * s["own"]).sum(dim=-1) <= 0
        false += bool((turned & (distance <= s["sigma_q"])).any())
    assert false > 100


@given(
    k=st.integers(1, 50),
    log_d=st.floats(-3, 6),
    alpha=st.floats(0, 6),
    value=st.floats(0.1, 5),
)
def test_the_sharp_limit_is_the_formula_and_below_the_simple_one(k, log_d, alpha, value):
    a, d, v = (torch.tensor(x, dtype=torch.float64) for x in (alpha, log_d, value))
    sharp = limit(k, d, a, v)
    expected = k * math.exp(alpha) * value / (math.exp(log_d) + k * math.exp(alpha))
    assert sharp.item() == pytest.approx(expected)
    assert sharp <= k * math.exp(alpha - log_d) * value * (1 + 1e-9)
    assert sharp < v


def test_no_control_turns_nothing():
    numbers = torch.tensor([1.0, 2.0])
    assert limit(0, numbers, numbers, numbers).tolist() == [0.0, 0.0]
    assert minimal_k(torch.zeros(2), numbers, numbers, numbers).tolist() == [0, 0]
    # Not even where control tokens have no value: nothing is to be turned.
    assert minimal_k(torch.zeros(2), numbers, numbers, torch.zeros(2)).tolist() == [0, 0]


@given(share=st.floats(0.01, 0.99), log_d=st.floats(-2, 8), alpha=st.floats(0, 3))
@settings(deadline=None)
def test_minimal_k_is_the_first_length_that_reaches(share, log_d, alpha):
    d, a, v = (torch.tensor(x, dtype=torch.float64) for x in (log_d, alpha, 2.0))
    k = int(minimal_k(v * share, d, a, v))
    assert limit(k, d, a, v) >= v * share * (1 - 1e-4)
    assert k == 1 or limit(k - 1, d, a, v) < v * share


def test_longer_than_any_value_is_out_of_reach_for_every_k():
    own = torch.tensor([[2.0, 0.0, 0.0]])
    wanted = torch.tensor([[0.0, 1.01 * 3.0, 0.0]])
    log_d, alpha, value = (torch.tensor([x]) for x in (0.5, 1.0, 3.0))
    for k in (1, 10, 10**6):
        assert too_long(wanted, own, limit(k, log_d, alpha, value))
    length = orthogonal_part(wanted, own).norm(dim=-1)
    assert minimal_k(length, log_d, alpha, value).tolist() == [-1]
    # B(k) comes near V and never there.
    assert minimal_k(value, log_d, alpha, value).tolist() == [-1]


def test_orthogonal_part_by_hand():
    part = orthogonal_part(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
    assert part.tolist() == [0.0, 4.0]
    assert orthogonal_part(torch.tensor([3.0, 4.0]), torch.zeros(2)).tolist() == [3.0, 4.0]
    short = orthogonal_part(torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]))  # along it
    torch.testing.assert_close(short, torch.zeros(2), atol=1e-6, rtol=0)


# Heads of real models


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_no_control_turns_a_real_head_beyond_its_limit(family):
    # Biases (gpt2), rotary and grouped queries (llama) and qk-norm (qwen3) are all in it.
    model = wb.wrap(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    state = State(torch.tensor([0]), torch.tensor([5, 9, 33, 7]), 0)
    reach = vocabulary_reach(model, range(6))
    ratios = []
    for _ in range(20):
        control = torch.randint(101, (int(torch.randint(1, 5, (1,), generator=generator)),))
        view = view_last(model, state, control, reach)
        found = orthogonal_part(view.whole, view.own).norm(dim=-1)
        ratios.append((found / limit(len(control), view.log_d, view.alpha, reach.value)).max())
    assert 0.1 < max(ratios) <= 1.0


def test_a_view_equals_the_models_own_attention():
    model = wb.wrap(tiny_model("llama"))
    state = State(torch.tensor([0]), torch.tensor([5, 9, 33, 7]), 0)
    reach = vocabulary_reach(model, range(6))
    view = view_last(model, state, torch.tensor([50, 51]), reach)
    row = torch.tensor([[0, 50, 51, 5, 9, 33, 7]])
    z = model.capture(row, ["L0.z"])["L0.z"][0, -1]
    torch.testing.assert_close(view.whole, z, rtol=1e-4, atol=1e-5)
    alone = model.capture(torch.tensor([[0, 5, 9, 33, 7]]), ["L0.z"])["L0.z"][0, -1]
    # Rotary positions are relative: with BOS alone in front, only BOS comes nearer.
    assert view.own.shape == alone.shape
    keys = model.capture(torch.arange(101)[:, None], ["L0.k"])["L0.k"].norm(dim=-1)
    assert (reach.key.view(2, 2)[:, 0] >= keys.amax(dim=(0, 1))).all()
    assert (reach.key.view(2, 2)[:, 0] <= 1.001 * keys.amax(dim=(0, 1))).all()


def one_layer(seed, write):
    config = ToyModelConfig(
        d_vocab=10, n_ctx=8, n_layers=1, n_heads=2, d_model=12, d_mlp=0, positions="rotary"
    )
    model = make_model(config, seed)
    with torch.no_grad():
        model.blocks[0].attention.W_O.weight.mul_(write)
        model.embed.weight.mul_(3.0)
    return ToyAdapter(model.requires_grad_(False))


@pytest.mark.parametrize("seed", range(3))
def test_excluded_targets_of_a_one_layer_model_are_out_of_reach(seed):
    model = one_layer(seed, write=0.3)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    config = ReachabilityConfig(
        method="brute-force", k_max=2, targets="uniform", targets_per_state=10, state_min=2
    )
    result = measure_reachability(model, tokens, config)
    assert result.bound_excluded.any()
    assert not (result.bound_excluded & result.reached()).any()


def test_a_final_norm_that_is_no_matrix_excludes_nothing():
    class Bent(ToyAdapter):
        """Its norm bends one half of all directions, that of no axis."""

        def final_norm(self, resid):
            normed = super().final_norm(resid)
            return torch.where(resid[..., :1] >= 0, normed, normed.clamp(min=0))

    straight = one_layer(0, write=0.3)
    problems = [
        Problem(State(torch.zeros(0, dtype=torch.long), torch.tensor([1, 2, 3]), 0), target, target)
        for target in range(10)
    ]
    assert excluded_pairs(straight, problems, 2, Context()).any()
    bent = Bent(straight.model)
    assert not excluded_pairs(bent, problems, 2, Context()).any()


def test_a_head_that_writes_much_excludes_less():
    tokens = torch.tensor([[1, 2, 3]])
    config = ReachabilityConfig(
        method="brute-force", k_max=1, targets="uniform", targets_per_state=10, state_min=2
    )
    counts = [
        int(measure_reachability(one_layer(0, write), tokens, config).bound_excluded.sum())
        for write in (0.0, 4.0, 30.0)
    ]
    assert counts[0] == 9  # nothing is written, so only the model's own choice remains
    assert counts[0] > counts[1] > counts[2]


def test_deep_models_are_not_bounded_as_a_whole():
    model = wb.wrap(tiny_model("llama"))
    config = ReachabilityConfig(method="greedy", k_max=1, targets="uniform", state_min=2)
    result = measure_reachability(model, torch.tensor([[5, 6, 7]]), config)
    assert not result.bound_excluded.any()
    assert (result.head_orthogonal <= result.head_limit + 1e-5).all()
