"""Attention sinks on patterns whose answer is known by hand, and on real weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.attention_sinks import (
    decompose,
    make_inputs,
    measure_attention_sinks,
    queries_after,
    swap_positions,
)
from probes.attention_sinks_results import (
    AttentionSinkConfig,
    AttentionSinkResult,
    peak_ratio,
    value_drain,
)
from tests.zoo import padded, random_tokens, tiny_model
from workbench.attention.written import written_norm
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.testing import PlantedModel, identity_pattern, sink_pattern, uniform_pattern

TOKENS = torch.zeros(2, 16, dtype=torch.long)
ANY = AttentionSinkConfig(threshold=0.5)


def harmonic(n):
    return sum(1.0 / k for k in range(1, n + 1))


# Mathematics


def received(pattern):
    """The score of one head with a given pattern."""
    model = PlantedModel(pattern[None, None, None])
    tokens = torch.zeros(1, len(pattern), dtype=torch.long)
    return measure_attention_sinks(model, tokens, AttentionSinkConfig(threshold=0.9)).score[0, 0, 0]


def test_attention_received_matches_hand_computation():
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(received(pattern), torch.tensor([1.7 / 3, 0.8 / 2, 0.5]))


def test_uniform_attention_scores_as_in_the_card():
    # Card section 6, identity 1: alpha_k = (H_T - H_{k-1}) / (T - k + 1), k from 1.
    found = received(uniform_pattern(64))
    expected = [(harmonic(64) - harmonic(k - 1)) / (64 - k + 1) for k in range(1, 65)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[0].item() == pytest.approx(0.0741, abs=1e-4)


def test_identity_attention_makes_the_last_keys_look_like_sinks():
    torch.testing.assert_close(received(identity_pattern(20)), 1.0 / torch.arange(20, 0, -1))


def test_ov_norms_equal_the_norm_after_the_output_projection():
    value, w_o = torch.randn(2, 5, 2, 3), torch.randn(4, 3, 12)
    repeated = value.repeat_interleave(2, dim=2)
    expected = torch.einsum("bphd,hdm->bhpm", repeated, w_o).norm(dim=-1)
    torch.testing.assert_close(written_norm(value, w_o @ w_o.transpose(-1, -2)), expected)


def test_peak_ratio_leaves_nan_and_the_position_itself_out():
    norm = torch.tensor([6.0, 1.0, 3.0, torch.nan])
    assert peak_ratio(norm, 0).item() == 3.0
    assert peak_ratio(norm, 2).item() == pytest.approx(3.0 / 3.5)


def test_value_drain_is_a_ratio_of_means():
    ov_norm = torch.tensor([[[1.0, 4.0, 4.0]], [[1.0, 8.0, 8.0]]])
    assert value_drain(ov_norm, 0) == pytest.approx(1.0 / 6.0)


@pytest.mark.parametrize("lengths", [None, [7, 4]])
def test_decomposition_equals_the_average_over_all_visible_pairs(lengths):
    query, key = torch.randn(2, 7, 4, 3), torch.randn(2, 7, 2, 3)
    valid = (
        torch.ones(2, 7)
        if lengths is None
        else (torch.arange(7) < torch.tensor(lengths)[:, None]).float()
    )
    found = decompose(*queries_after(query, None if lengths is None else valid), key)
    keys = key.repeat_interleave(2, dim=2)
    for b in range(2):
        for pos in range(int(valid[b].sum())):
            queries = query[b, pos : int(valid[b].sum())]
            dots = torch.einsum("thd,hd->th", queries, keys[b, pos])
            product = queries.norm(dim=-1) * keys[b, pos].norm(dim=-1)
            torch.testing.assert_close(found["cosine"][b, :, pos], (dots / product).mean(0))
            torch.testing.assert_close(found["product"][b, :, pos], product.mean(0))


def test_swap_exchanges_two_positions():
    assert swap_positions(5, 3).tolist() == [3, 1, 2, 0, 4]


# Planted structure


def planted_patterns():
    pattern = uniform_pattern(16).repeat(2, 2, 3, 1, 1)
    pattern[:, 1, 2] = sink_pattern(16)
    pattern[0, 0, 1] = sink_pattern(16)  # on the first prompt only
    return pattern


def test_head_must_sink_on_every_prompt():
    result = measure_attention_sinks(PlantedModel(planted_patterns()), TOKENS, ANY)
    assert result.sink_heads() == [(1, 2)]
    assert result.sink_rate() == pytest.approx(3 / 12)
    # Mean over all (prompt, layer, head): 3 perfect sinks, 9 uniform heads.
    expected = (3 + 9 * harmonic(16) / 16) / 12
    assert result.metrics()["mean_score"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pos", [0, 1, 5])
def test_score_follows_the_sink_when_it_moves(pos):
    pattern = sink_pattern(16, pos).repeat(2, 1, 1, 1, 1)
    config = AttentionSinkConfig(threshold=0.5, position=pos)
    result = measure_attention_sinks(PlantedModel(pattern), TOKENS, config)
    assert (result.score[..., pos] == 1.0).all()
    assert result.metrics()["sink_rate"] == 1.0


def test_uniform_attention_has_no_sink():
    pattern = uniform_pattern(16).repeat(2, 2, 3, 1, 1)
    result = measure_attention_sinks(PlantedModel(pattern), TOKENS, AttentionSinkConfig())
    assert result.sink_rate() == 0.0


def test_score_equal_to_the_threshold_is_not_a_sink():
    flat = torch.full((1, 1, 16), 1.0)
    result = AttentionSinkResult(
        torch.full((1, 1, 1, 16), 0.5), flat, flat, flat, torch.ones(2, 16), flat, flat, ANY
    )
    assert result.sink_rate() == 0.0
    assert result.sink_heads() == []


def test_planted_drain_and_peak_are_found():
    value = torch.ones(2, 16, 3, 4)
    value[:, 0] = 0.25
    peak = torch.ones(2, 16, 12)
    peak[:, 0] = 40.0
    sites = {"L0.v": value, "L1.v": value, "L0.resid_pre": torch.ones(2, 16, 12)}
    sites |= {"L0.resid_post": peak, "L1.resid_post": torch.ones(2, 16, 12)}
    result = measure_attention_sinks(PlantedModel(planted_patterns(), sites), TOKENS, ANY)
    assert result.metrics()["value_drain"] == pytest.approx(0.25)
    assert result.metrics()["resid_peak_ratio"] == pytest.approx(40.0)
    torch.testing.assert_close(result.resid_norm[1, 0], torch.tensor(40.0 * 12**0.5))


# Invariances


@given(order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_order_of_prompts_does_not_matter(order):
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(4, 1, 2, 12, 12, generator=generator).tril().softmax(-1)
    tokens = torch.zeros(4, 12, dtype=torch.long)
    whole = measure_attention_sinks(PlantedModel(pattern), tokens, ANY)
    shuffled = measure_attention_sinks(PlantedModel(pattern[list(order)]), tokens, ANY)
    torch.testing.assert_close(shuffled.score, whole.score[list(order)])
    assert shuffled.metrics() == pytest.approx(whole.metrics())


def test_batch_size_does_not_change_the_numbers():
    model = wb.wrap(tiny_model("llama"))
    tokens = random_tokens(5)
    whole = measure_attention_sinks(model, tokens, ANY)
    parts = measure_attention_sinks(model, tokens, ANY, Context(batch_size=2))
    torch.testing.assert_close(parts.score, whole.score, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.resid_norm, whole.resid_norm)


def test_padded_prompts_score_as_alone():
    tokens, mask = padded(random_tokens(2, 16), [16, 11], "right")
    model = wb.wrap(tiny_model("llama"))
    together = measure_attention_sinks(
        model, tokens, AttentionSinkConfig(), Context(attention_mask=mask)
    )
    alone = measure_attention_sinks(model, tokens[1:, :11], AttentionSinkConfig())
    torch.testing.assert_close(together.score[1, ..., :11], alone.score[0], rtol=0, atol=1e-5)
    assert together.score[1, ..., 11:].isnan().all()
    expected = measure_attention_sinks(model, tokens[:1], AttentionSinkConfig())
    torch.testing.assert_close(together.resid_norm[:, 11:], expected.resid_norm[:, 11:])
    both = (expected.value_norm[..., :11] + alone.value_norm) / 2
    torch.testing.assert_close(together.value_norm[..., :11], both)


# Against an independent implementation: eager attention of transformers


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_scores_and_norms_equal_those_of_eager_transformers(family):
    tokens = random_tokens(3, 16)
    eager = tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        out = eager(tokens, output_attentions=True, output_hidden_states=True, use_cache=True)
    result = measure_attention_sinks(wb.wrap(tiny_model(family)), tokens, AttentionSinkConfig())
    after = torch.arange(16, 0, -1)
    expected = torch.stack([attention.sum(-2) / after for attention in out.attentions], dim=1)
    torch.testing.assert_close(result.score, expected, rtol=0, atol=1e-4)
    for layer in range(
        1
    ):  # hidden_states[1] is after block 0; the last one is after the final norm
        norm = out.hidden_states[layer].norm(dim=-1).mean(0)
        torch.testing.assert_close(result.resid_norm[layer], norm, rtol=1e-4, atol=1e-4)
    keys = [cache.keys for cache in out.past_key_values.layers]
    values = [cache.values for cache in out.past_key_values.layers]
    if keys[0].shape[2] == 16:  # a sliding cache keeps the window only
        torch.testing.assert_close(
            result.key_norm[0], keys[0].norm(dim=-1).mean(0), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            result.value_norm[0], values[0].norm(dim=-1).mean(0), rtol=1e-4, atol=1e-4
        )


# Inputs


def test_repeated_tokens_without_positions_attend_uniformly():
    # Card section 6, identity 3: rotary keeps values equal, so the residual stream is equal too.
    model = wb.wrap(tiny_model("llama"))
    config = AttentionSinkConfig(inputs="repeat")
    result = measure_attention_sinks(model, random_tokens(2, 16), config)
    torch.testing.assert_close(
        result.resid_norm, result.resid_norm[:, :1].expand(-1, 16), rtol=1e-4, atol=1e-4
    )


def test_repeat_and_random_inputs_have_the_shape_of_the_prompts():
    tokens = torch.zeros(3, 50, dtype=torch.long)
    context = Context(seed=5)
    repeated = make_inputs(tokens, AttentionSinkConfig(inputs="repeat"), 100, context)
    assert (repeated == repeated[:, :1]).all()
    assert len(set(repeated[:, 0].tolist())) > 1
    drawn = make_inputs(tokens, AttentionSinkConfig(inputs="random"), 100, context)
    assert drawn.shape == tokens.shape
    assert len(set(drawn.flatten().tolist())) > 50
    assert torch.equal(
        drawn, make_inputs(tokens, AttentionSinkConfig(inputs="random"), 100, context)
    )


def test_swapped_positions_move_what_position_zero_had():
    # With one token repeated, swapping two position embeddings swaps the residual stream's entry.
    model = wb.wrap(tiny_model("gpt2"))
    tokens = random_tokens(2, 16)
    plain = measure_attention_sinks(model, tokens, AttentionSinkConfig(inputs="repeat"))
    config = AttentionSinkConfig(inputs="swap", position=4)
    swapped = measure_attention_sinks(model, tokens, config)
    torch.testing.assert_close(swapped.resid_norm[0, 4], plain.resid_norm[0, 0])
    torch.testing.assert_close(swapped.resid_norm[0, 0], plain.resid_norm[0, 4])
    torch.testing.assert_close(swapped.resid_norm[0, 1:4], plain.resid_norm[0, 1:4])
    assert set(swapped.metrics()) - set(plain.metrics()) == {"sink_rate_at_0"}


@pytest.mark.parametrize("backend", ["hf", "transformer-lens", "nnsight"])
def test_swapped_positions_equal_swapped_position_embeddings(backend, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    by_hand = tiny_model("gpt2")
    with torch.no_grad():
        table = by_hand.transformer.wpe.weight
        table[[0, 4]] = table[[4, 0]].clone()
    tokens = random_tokens(2, 16)
    config = AttentionSinkConfig(inputs="swap", position=4)
    found = measure_attention_sinks(wb.load(str(tmp_path), backend=backend), tokens, config)
    repeat = AttentionSinkConfig(inputs="repeat")
    expected = measure_attention_sinks(wb.wrap(by_hand), tokens, repeat)
    torch.testing.assert_close(found.score, expected.score, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.resid_norm, expected.resid_norm, rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1])
def test_threshold_outside_unit_interval_is_refused(threshold):
    with pytest.raises(ConfigError, match="strictly between 0"):
        AttentionSinkConfig(threshold=threshold)


def test_short_prompts_are_refused_unless_the_threshold_is_set():
    pattern = uniform_pattern(9).repeat(2, 1, 1, 1, 1)
    tokens = torch.zeros(2, 9, dtype=torch.long)
    with pytest.raises(DataError, match=r"at least 10 tokens.*prompt 0 has 9"):
        measure_attention_sinks(PlantedModel(pattern), tokens, AttentionSinkConfig())
    result = measure_attention_sinks(
        PlantedModel(pattern), tokens, AttentionSinkConfig(threshold=0.3)
    )
    assert result.sink_rate() == 1.0  # the reason: H_9 / 9 = 0.314


def test_position_near_the_end_is_refused():
    pattern = identity_pattern(16).repeat(2, 1, 1, 1, 1)
    config = AttentionSinkConfig(position=14)
    with pytest.raises(DataError, match="before a prompt's end"):
        measure_attention_sinks(PlantedModel(pattern), TOKENS, config)


def test_swap_needs_learned_positions_and_a_position():
    with pytest.raises(ConfigError, match="at least 1"):
        AttentionSinkConfig(inputs="swap")
    config = AttentionSinkConfig(inputs="swap", position=3)
    with pytest.raises(CapabilityError, match="learned position"):
        measure_attention_sinks(wb.wrap(tiny_model("llama")), random_tokens(1, 16), config)
