"""The identities of the two method cards, in double precision where the card gives them so."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.attention.edits import AttentionCall
from workbench.attention.inputs import AttentionInputs
from workbench.interventions.act import ACT, damp
from workbench.interventions.zerotuning import ZeroTuning, scale_first_column, scale_first_key
from workbench.models.base import ModelSpec

BATCH, HEADS, N_POS, D_HEAD = 2, 3, 9, 8
SPEC = ModelSpec(
    name="made", revision="", family="made", n_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
    d_model=24, d_head=D_HEAD, d_mlp=8, d_vocab=10, n_ctx=64,
)  # fmt: skip


def attention(seed=0, bias=None):
    """Scores, pattern, values and output of a causal layer, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, N_POS, D_HEAD)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    scores = query @ key.transpose(-1, -2) / D_HEAD**0.5
    scores = scores.masked_fill(torch.ones(N_POS, N_POS).triu(1).bool(), -torch.inf)
    pattern = scores.softmax(-1)
    return query, key, value, scores, pattern, (pattern @ value).transpose(1, 2)


def through_output(edit, query, key, value, scores, z):
    """The edit's output form, float32."""
    (planned,) = edit.plan(SPEC)
    if not planned.uses_output(torch.float32):
        first = torch.zeros(BATCH, dtype=torch.long)
        edited = planned.pattern(scores.softmax(-1).float(), first)
        return torch.einsum("bhqk,bhkd->bqhd", edited, value.float()).double()
    inputs = AttentionInputs(query.float(), key.float(), value.float(), None, D_HEAD**-0.5)
    call = AttentionCall(0, inputs, scores.logsumexp(-1).float(), None)
    return planned.output(call, z.float()).double()


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=atol)


# ZeroTuning


@given(log_gamma=st.floats(-3.0, 3.0).filter(lambda x: abs(x) > 1e-6), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_rescaling_bias_output_form_and_longer_heads_are_one_map(log_gamma, seed):
    gamma = float(np.exp(log_gamma))
    query, key, value, scores, pattern, z = attention(seed)
    defined = pattern.clone()
    defined[..., 0] *= gamma
    defined = defined / (1 + (gamma - 1) * pattern[..., :1])
    bias = torch.zeros(N_POS, dtype=torch.float64)
    bias[0] = log_gamma
    close((scores + bias).softmax(-1), defined, 1e-12)
    # One more dimension: query 1, key sqrt(d) log gamma on the first, the same scale as before.
    ones = torch.ones_like(query[..., :1])
    extra = torch.zeros_like(ones)
    extra[:, :, 0] = D_HEAD**0.5 * log_gamma
    longer = torch.cat([query, ones], -1) @ torch.cat([key, extra], -1).transpose(-1, -2)
    hidden = scores == -torch.inf
    close((longer / D_HEAD**0.5).masked_fill(hidden, -torch.inf).softmax(-1), defined, 1e-12)
    # Ours, both forms.
    by_column = scale_first_column(
        pattern.float(), torch.zeros(BATCH, dtype=torch.long), torch.tensor(gamma)
    )
    close(by_column, defined)
    wanted = (defined @ value).transpose(1, 2)
    close(through_output(ZeroTuning(gamma), query, key, value, scores, z), wanted)
    # exp(o' - o) in closed form: o' - o = (gamma - 1) a_0 (v_0 - o) / D, never more than that.
    first = pattern[..., 0].transpose(1, 2)[..., None]
    step = (gamma - 1) * first / (1 + (gamma - 1) * first) * (value[:, :, 0][:, None] - z)
    close(wanted - z, step, 1e-12)


def test_weights_follow_the_sigmoid_law_and_keep_their_ratios():
    pattern, gamma = attention()[4][:, :, 1:], 2.7
    edited = scale_first_column(
        pattern.float(), torch.zeros(BATCH, dtype=torch.long), torch.tensor(gamma)
    ).double()
    close(edited[..., 0], torch.sigmoid(torch.logit(pattern[..., 0]) + np.log(gamma)))
    close(edited.sum(-1), torch.ones(BATCH, HEADS, N_POS - 1), 1e-6)
    share = edited[..., 1:] / edited[..., 1:].sum(-1, keepdim=True)
    close(share, pattern[..., 1:] / pattern[..., 1:].sum(-1, keepdim=True))
    # Differences between the others shrink by D: |a_i - a_j| |gamma - 1| a_0 / D, more with more a_0.
    first, others = pattern[..., 0], pattern[..., 1:]
    scale = 1 + (gamma - 1) * first
    gap = (others[..., 0] - others[..., 1]).abs()
    after = (edited[..., 1] - edited[..., 2]).abs()
    close(gap - after, gap * (gamma - 1) * first / scale)


def test_the_derivatives_of_weight_and_entropy_are_the_card_s():
    scores = attention()[3][:, :, 1:].clone()
    log_gamma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(N_POS, dtype=torch.float64)
    bias[0] = 1.0
    pattern = (scores + log_gamma * bias).softmax(-1)
    for row in range(1, N_POS - 1):
        weights = pattern[0, 0, row, : row + 2]
        first = weights[0]
        entropy = -(weights * weights.log()).sum()
        (slope,) = torch.autograd.grad(entropy, log_gamma, retain_graph=True)
        close(slope, first * (-first.log() - entropy), 1e-12)
        (slope,) = torch.autograd.grad(first, log_gamma, retain_graph=True)
        close(slope, first * (1 - first), 1e-12)
        rest = weights[1:] / weights[1:].sum()
        (slope,) = torch.autograd.grad((-rest * rest.log()).sum(), log_gamma, retain_graph=True)
        assert abs(float(slope)) < 1e-12  # entropy among the others never moves


def test_gamma_at_its_ends_is_the_first_value_or_a_hidden_key():
    query, key, value, scores, _pattern, z = attention()
    most = through_output(ZeroTuning(1e30), query, key, value, scores, z)
    close(most, value[:, :, :1].transpose(1, 2).expand_as(z))
    least = through_output(ZeroTuning(1e-30), query, key, value, scores, z)
    hidden = scores.clone()
    hidden[:, :, 1:, 0] = -torch.inf
    close(least[:, 1:], (hidden.softmax(-1) @ value).transpose(1, 2)[:, 1:])
    close(least[:, 0], z[:, 0])  # a row that sees the first key alone stays


def test_a_head_without_the_sink_stays_and_a_drained_value_is_a_gain():
    query, key, value, scores, pattern, _ = attention()
    away = scores.clone()
    away[:, :, 1:, 0] = -200.0  # no weight on the first key
    key = key.clone()
    value = value.clone()
    value[:, :, 0] = 0.0
    drained = (pattern @ value).transpose(1, 2)
    found = through_output(ZeroTuning(3.0), query, key, value, scores, drained)
    gain = 1 / (1 + 2.0 * pattern[..., 0]).transpose(1, 2)[..., None]
    close(found, drained * gain)
    faint = away.softmax(-1)
    edited = scale_first_column(
        faint.float(), torch.zeros(BATCH, dtype=torch.long), torch.tensor(3.0)
    )
    close(edited, faint, 1e-6)


def test_the_gradient_of_log_gamma_is_the_card_s_sum():
    _, _, value, _, pattern, z = attention()
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_gamma = torch.zeros(HEADS, requires_grad=True)
    edited = scale_first_key(
        z.float(), pattern[..., 0].float(), value[:, :, 0].float(), log_gamma.exp()[None, :, None]
    )
    (found,) = torch.autograd.grad((edited * weights.float()).sum(), log_gamma)
    first = pattern[..., 0].transpose(1, 2)[..., None]
    close(found, (first * (value[:, :, 0][:, None] - z) * weights).sum((0, 1, 3)), 1e-4)


def test_key_mode_has_every_query_s_own_gamma_and_lowers_negative_scores():
    query, key, value, scores, pattern, z = attention()
    scaled = key.clone()
    scaled[:, :, 0] *= 1.8
    changed = query @ scaled.transpose(-1, -2) / D_HEAD**0.5
    changed = changed.masked_fill(scores == -torch.inf, -torch.inf).softmax(-1)
    found = through_output(ZeroTuning(1.8, mode="key"), query, key, value, scores, z)
    close(found, (changed @ value).transpose(1, 2))
    gamma = torch.exp(0.8 * scores[..., 0])
    by_row = pattern.clone()
    by_row[..., 0] *= gamma
    close(by_row / (1 + (gamma - 1) * pattern[..., 0])[..., None], changed, 1e-12)
    negative = scores[:, :, 1:, 0] < 0
    assert bool((changed[:, :, 1:, 0] < pattern[:, :, 1:, 0])[negative].all())


@pytest.mark.parametrize("gamma", [1e-4, 1e6])
@pytest.mark.parametrize("mode", ["score", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gammas_leave_no_rounding_behind(mode, gamma, dtype):
    model, tokens = wb.wrap(tiny_model("llama").to(dtype)), random_tokens()
    stock = model.capture(tokens, ["L0.attn_scores", "L0.v"])
    scores = stock["L0.attn_scores"].double()
    if mode == "key":
        scores[..., 0] = torch.where(
            scores[..., 0] > -torch.inf, gamma * scores[..., 0], -torch.inf
        )
    else:
        scores[..., 0] += np.log(gamma)
    value = stock["L0.v"].double().repeat_interleave(2, dim=2)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    with model.edit(ZeroTuning(gamma, mode=mode)):
        found = model.capture(tokens, ["L0.z"])["L0.z"]
    scale = value.abs().max()
    close(found / scale, wanted / scale, 2.0**-7 if dtype == torch.bfloat16 else 1e-5)


# One gamma a head


def test_every_head_has_the_gamma_that_was_given_for_it():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    heads, gammas = ((1, 2), (0, 1), (1, 0)), (3.0, 0.5, 1.0)
    with model.edit(ZeroTuning(gammas, heads)):
        together = model.logits(tokens)
    with model.edit(*(ZeroTuning(g, (h,)) for g, h in zip(gammas, heads, strict=True))):
        torch.testing.assert_close(model.logits(tokens), together, rtol=0, atol=1e-4)
    table = ZeroTuning(gammas, heads).table(model.spec)
    assert table.tolist() == [[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 3.0, 1.0]]
    assert ZeroTuning((1.0,) * 8).plan(model.spec) == []  # nothing to change, nothing hooked


@pytest.mark.parametrize("mode", ["score", "key"])
def test_heads_with_gamma_1_stay_bit_for_bit(mode):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens()
    stock = model.capture(tokens, ["L0.q", "L0.k", "L0.v"])
    with model.edit(wb.ZeroTuning(3.0, ((0, 0),), mode=mode)):
        one = model.capture(tokens, ["L0.z"])["L0.z"]
    with model.edit(wb.ZeroTuning(5.0, ((0, 0), (0, 2)), mode=mode)):
        two = model.capture(tokens, ["L0.z"])["L0.z"]
    assert torch.equal(one[:, :, [1, 3]], two[:, :, [1, 3]])
    groups = stock["L0.v"].repeat_interleave(2, dim=2).transpose(1, 2)
    key = stock["L0.k"].repeat_interleave(2, dim=2).transpose(1, 2)
    plain = torch.nn.functional.scaled_dot_product_attention(
        stock["L0.q"].transpose(1, 2), key, groups, is_causal=True
    )
    torch.testing.assert_close(one[:, :, 1], plain[:, 1], rtol=0, atol=1e-6)


def test_a_file_holds_one_gamma_a_head():
    model = wb.wrap(tiny_model("llama"))
    content = {"name": "zerotuning", "gamma": [2, 0.5], "heads": [[0, 1], [1, 3]]}
    with model.edit(content):
        assert model.interventions == (ZeroTuning((2.0, 0.5), ((0, 1), (1, 3))),)


# ACT


def test_bias_direct_and_gathered_are_one_map():
    _, _, value, scores, pattern, z = attention()
    sinks = torch.rand(pattern.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    sinks[..., 0] = False
    edited = damp(pattern.float(), sinks, 0.4).double()
    mass = (pattern * sinks).sum(-1, keepdim=True)
    bias = np.log(0.4) - torch.log(1 + 0.6 * mass / (1 - mass))
    close(torch.where(sinks, scores + bias, scores).softmax(-1), edited, 1e-6)
    on_sinks = ((pattern * sinks) @ value).transpose(1, 2)
    mass = mass.transpose(1, 2)
    gathered = 0.4 * on_sinks + (1 - 0.4 * mass) / (1 - mass) * (z - on_sinks)
    close((edited @ value).transpose(1, 2), gathered)


def released_rule(pattern, threshold, beta):
    """What the released code does to one prompt's map when the first token is a sink, by the card."""
    edited = pattern.copy()
    for head in range(pattern.shape[0]):
        n_pos = pattern.shape[1]
        received = pattern[head].sum(0) / np.arange(n_pos, 0, -1)
        sinks = np.flatnonzero(received > threshold)[1:]
        for row in range(1, n_pos):
            mass = pattern[head, row, sinks].sum()
            edited[head, row] = pattern[head, row] * (1 + (1 - beta) * mass / (1 - mass))
            edited[head, row, sinks] = beta * pattern[head, row, sinks]
        edited[head, 0, 0] = 1.0
    return edited


def test_full_mode_is_the_released_rule_where_the_first_token_is_a_sink():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(1)
    n_pos = tokens.shape[1]
    stock = model.capture(tokens, ["L0.attn_scores"])["L0.attn_scores"][0].double()
    stock = stock.softmax(-1).numpy()
    threshold = 0.1
    received = stock.sum(1)[:, 0] / n_pos
    chosen = [head for head in range(4) if received[head] > threshold]
    assert chosen  # the released code protects the first of the sinks, whichever it is
    edit = ACT(threshold * n_pos, 0.4, tuple((0, head) for head in chosen), mode="full")
    with model.edit(edit):
        edited = model.capture(tokens, ["L0.pattern"])["L0.pattern"][0, chosen]
    wanted = released_rule(stock[chosen], threshold, 0.4)
    close(edited, torch.tensor(wanted))
    assert (wanted - stock[chosen]).max() > 0.01


def test_the_demo_model_has_sinks_beyond_the_first_token_on_text():
    from workbench.interventions.damped_mass import DampedMass
    from workbench.models.base import Site

    model = wb.load("demo")
    text = "The river rose in the night, and in the morning the river stood in the streets. " * 3
    tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
    sites = [Site("pattern", layer) for layer in range(model.spec.n_layers)]
    found = model.capture(tokens, sites, DampedMass(ACT()))
    assert any(bool((found[site] > 0).any()) for site in sites)
