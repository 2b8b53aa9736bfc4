"""Edits of the pattern: their output form, their definition on the eager pattern, and decoding."""

import pytest
import torch

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge
from tests.zoo import ATTENTION_FAMILIES, padded, random_tokens, tiny_model
from workbench.attention.statistics import RowEntropy
from workbench.attention.whole import change_pattern
from workbench.errors import CapabilityError, ConfigError
from workbench.interventions.mean_heads import MeanHeads, mean_z
from workbench.interventions.move_to_first import MoveToFirst
from workbench.interventions.scale_keys import ScaleKeys
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import Site

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

N_POS = 12


def moved(scores):
    """All attention to the first key, where it is seen."""
    pattern = scores.softmax(-1)
    first = torch.zeros_like(pattern)
    first[..., 0] = 1.0
    return torch.where(scores[..., :1] > -torch.inf, first, pattern)


def keys_scaled(scores):
    """The first and the fourth key's weights times 3, then divided by the row's sum."""
    pattern = scores.softmax(-1)
    scaled = pattern.clone()
    scaled[..., [0, 3]] *= 3.0
    return scaled / scaled.sum(-1, keepdim=True)


def key_multiplied(raw):
    """The first key times 1.5, and with it every raw score on it."""
    changed = raw.clone()
    changed[..., 0] *= 1.5
    return changed


EDITS = {
    "move-to-first": (MoveToFirst(), moved),
    "scale-keys": (ScaleKeys((0, 3), 3.0), keys_scaled),
}


def captured(model, tokens, *names):
    return [model.capture(tokens, [Site(name, 0)])[Site(name, 0)] for name in names]


def mixed(model, pattern, value):
    groups = model.spec.n_heads // model.spec.n_kv_heads
    return torch.einsum("bhqk,bkhd->bqhd", pattern, value.repeat_interleave(groups, dim=2))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", [f for f in ATTENTION_FAMILIES if f != "gpt_oss"])
def test_both_forms_equal_the_definition(family, name):
    edit, definition = EDITS[name]
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, N_POS)
    scores, value = captured(model, tokens, "attn_scores", "v")
    wanted = definition(scores.double()).float()
    with model.edit(edit):
        (output,) = captured(model, tokens, "z")
        (pattern,) = captured(model, tokens, "pattern")
    torch.testing.assert_close(pattern, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(output, mixed(model, wanted, value), rtol=0, atol=2e-5)
    assert (wanted - scores.softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("family", [f for f in ATTENTION_FAMILIES if f != "gpt_oss"])
def test_key_mode_multiplies_the_first_key_before_the_cap(family):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, N_POS)
    scores, value = captured(model, tokens, "attn_scores", "v")
    cap = getattr(model.model.config, "attn_logit_softcapping", None)
    scores = scores.double()
    raw = scores if cap is None else cap * torch.atanh(scores.clamp(-cap + 1e-9, cap - 1e-9) / cap)
    changed = key_multiplied(torch.where(scores > -torch.inf, raw, scores))
    if cap is not None:
        changed = torch.where(scores > -torch.inf, cap * torch.tanh(changed / cap), scores)
    wanted = changed.softmax(-1).float()
    with model.edit(ZeroTuning(1.5, mode="key")):
        (output,) = captured(model, tokens, "z")
        (pattern,) = captured(model, tokens, "pattern")
    torch.testing.assert_close(pattern, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(output, mixed(model, wanted, value), rtol=0, atol=5e-5)
    lowered = (scores[..., 0] < -0.1) & (scores[..., 0] > -torch.inf)
    before = scores.softmax(-1)[..., 0].float()
    assert bool((wanted[..., 0] <= before + 1e-6)[lowered].all())  # a negative score: less weight
    assert (wanted - scores.softmax(-1).float()).abs().max() > 0.01


def test_score_mode_on_the_first_key_is_scale_keys_there():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    with model.edit(ZeroTuning(2.5)):
        tuned = model.logits(tokens)
    with model.edit(ScaleKeys((0,), 2.5)):
        torch.testing.assert_close(model.logits(tokens), tuned, rtol=0, atol=1e-5)


def test_gammas_compose_and_move_the_entropy_as_the_card_says():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(1, N_POS)
    with model.edit(ZeroTuning(1.5), ZeroTuning(2.0)):
        twice = model.logits(tokens)
    with model.edit(ZeroTuning(3.0)):
        torch.testing.assert_close(model.logits(tokens), twice, rtol=0, atol=1e-5)

    def entropy(gamma):
        with model.edit(ZeroTuning(gamma)):
            site = Site("pattern", 0)
            return model.capture(tokens, [site], RowEntropy())[site].double()

    (pattern,) = captured(model, tokens, "pattern")
    step = 1e-3
    slope = (entropy(1 + step) - entropy(1 - step)) / (2 * step)
    first = pattern[..., 0].double()
    wanted = first * (-first.clamp(min=1e-30).log() - entropy(1.0))
    torch.testing.assert_close(slope, wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "edit",
    [MoveToFirst(), ScaleKeys((0, 3), 3.0), ZeroTuning(1.7, mode="key")],
    ids=lambda edit: edit.name,
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
def test_decoding_with_and_without_a_cache_equals_the_whole_pass(family, edit):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, 8), [8, 5], "left")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1}
    with model.edit(edit):
        cached = model.generate(tokens, attention_mask=mask, **options)
        uncached = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
        for row, length in enumerate([8, 5]):
            text = cached[row : row + 1, 8 - length :]
            teacher = model.logits(text)[0, length - 1 : -1].argmax(-1)
            assert torch.equal(cached[row, 8:], teacher)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    "edit", [MoveToFirst(), ScaleKeys((0, 3), 3.0)], ids=lambda edit: edit.name
)
def test_the_bridge_has_the_same_edit(edit):
    model, bridge = wb.wrap(tiny_model("llama")), through_bridge(tiny_model("llama"))
    tokens, mask = padded(random_tokens(2, N_POS), [N_POS, 7], "left")
    with model.edit(edit), bridge.edit(edit):
        shown = mask.bool()
        wanted = model.logits(tokens, mask)[shown]
        torch.testing.assert_close(bridge.logits(tokens, mask)[shown], wanted, rtol=0, atol=5e-5)


def test_key_mode_is_refused_where_only_patterns_are_handed_over():
    bridge = through_bridge(tiny_model("llama"))
    with bridge.edit(ZeroTuning(2.0, mode="key")), pytest.raises(CapabilityError, match="hf"):
        bridge.logits(random_tokens(1, 4))


def test_edits_stack_on_one_layer_in_the_order_given():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    scores, value = captured(model, tokens, "attn_scores", "v")
    both = keys_scaled(key_multiplied(scores.double())).float()
    with model.edit(ZeroTuning(1.5, mode="key"), ScaleKeys((0, 3), 3.0)):
        output, pattern = captured(model, tokens, "z", "pattern")
    torch.testing.assert_close(pattern, both, rtol=0, atol=2e-5)
    torch.testing.assert_close(output, mixed(model, both, value), rtol=0, atol=5e-5)


def test_a_mean_ablated_head_writes_the_same_everywhere():
    model = wb.wrap(tiny_model("llama"))
    tokens, mask = padded(random_tokens(3, N_POS), [N_POS, 7, 4], "right")
    heads = ((0, 1), (1, 0), (0, 3))
    mean = mean_z(model, [(tokens[:2], mask[:2]), (tokens[2:], mask[2:])], heads)
    sites = [Site("z", 0), Site("z", 1)]
    z = model.capture(tokens, sites, attention_mask=mask)
    shown = mask.bool()
    for index, (layer, head) in enumerate(heads):
        by_hand = z[Site("z", layer)][shown][:, head].mean(0)
        torch.testing.assert_close(mean[index], by_hand, rtol=0, atol=1e-5)
    with model.edit(MeanHeads(heads, mean)):
        edited = model.capture(tokens, sites, attention_mask=mask)
    assert torch.equal(edited["L0.z"][:, :, 1], mean[0].expand(3, N_POS, -1))
    assert torch.equal(edited["L0.z"][:, :, 3], mean[2].expand(3, N_POS, -1))
    assert torch.equal(edited["L0.z"][:, :, [0, 2]], z["L0.z"][:, :, [0, 2]])
    assert torch.equal(edited["L1.z"][:, :, 0], mean[1].expand(3, N_POS, -1))


@pytest.mark.parametrize("edit", [ScaleKeys((0, 3), 1.0), ScaleKeys((), 2.0)], ids=["one", "empty"])
def test_no_ops_are_bitwise_stock(edit):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    stock = model.logits(tokens)
    with model.edit(edit):
        assert torch.equal(model.logits(tokens), stock)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="factor must be above 0"):
        ScaleKeys((0,), 0.0)
    with pytest.raises(ConfigError, match="different and 0 or more"):
        ScaleKeys((1, 1), 2.0)
    with pytest.raises(ConfigError, match="mode must be score or key"):
        ZeroTuning(2.0, mode="query")
    with pytest.raises(ConfigError, match="gamma must be above 0"):
        ZeroTuning(float("nan"))
    model = wb.wrap(tiny_model("llama"))
    with (
        pytest.raises(ConfigError, match="one vector a head"),
        model.edit(MeanHeads(((0, 1),), torch.zeros(2, 8))),
    ):
        pass


def test_a_file_brings_scaled_keys_back():
    model = wb.wrap(tiny_model("llama"))
    content = {"name": "scale-keys", "positions": [0, 2], "factor": 2.0, "heads": [[0, 1]]}
    with model.edit(content):
        assert model.interventions == (ScaleKeys((0, 2), 2.0, ((0, 1),)),)


def test_a_probe_inside_an_edit_measures_the_edited_model():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    with model.edit(ScaleKeys((0, 3), 3.0)):
        measured = wb.run("attention-sinks", model, tokens)
    (scores,) = captured(model, tokens, "attn_scores")
    edited = keys_scaled(scores.double())
    received = edited.sum(dim=-2) / torch.arange(N_POS, 0, -1)
    torch.testing.assert_close(measured.score[:, 0].double(), received, rtol=0, atol=1e-5)
    assert measured.key != wb.run("attention-sinks", model, tokens).key


BFLOAT16 = 2.0**-7
"""Spacing of bfloat16 below 1: the pattern is changed in float32 and only z is rounded to it."""


@pytest.mark.parametrize(
    "edit", [ScaleKeys((0, 3), 3.0), MoveToFirst()], ids=lambda edit: edit.name
)
def test_in_half_precision_the_output_is_rounded_once(edit):
    model = wb.wrap(tiny_model("llama", dtype=torch.bfloat16))
    tokens = random_tokens(2, N_POS)
    definition = {"scale-keys": keys_scaled, "move-to-first": moved}[edit.name]
    scores, value = captured(model, tokens, "attn_scores", "v")
    wanted = mixed(model, definition(scores.double()).float(), value)
    with model.edit(edit):
        (output,) = captured(model, tokens, "z")
    scale = value.abs().max()
    torch.testing.assert_close(output / scale, wanted / scale, rtol=0, atol=2 * BFLOAT16)


@pytest.mark.parametrize(
    "edit", [wb.ACT(alpha=1.0, beta=0.0, protect_first=False), wb.ZeroTuning(0.02)]
)
def test_what_half_precision_rounds_off_a_row_is_no_learned_sink(edit):
    """Backends that hand patterns over: rows sum to 1 after the edit as they did before it."""
    logits = 6 * torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    pattern = logits.masked_fill(hidden, -torch.inf).softmax(-1).to(torch.bfloat16)
    spec = wb.wrap(tiny_model("llama")).spec
    (first, *_) = edit.plan(spec)
    changed = change_pattern(first, pattern, torch.zeros(2, dtype=torch.long))
    assert not torch.equal(changed, pattern)
    assert (changed.float().sum(-1) - 1).abs().max() < 0.01
    stock = change_pattern(first, pattern[:, :, :1], torch.zeros(2, dtype=torch.long))
    assert torch.equal(stock, pattern[:, :, :1])  # a row that sees itself alone keeps its bits


def test_heads_may_be_a_list_and_must_differ():
    found = MeanHeads([(0, 1), (1, 0)], torch.zeros(2, 8))
    assert found.heads == ((0, 1), (1, 0))
    with pytest.raises(ConfigError, match="heads must be different"):
        MeanHeads([(0, 1), (0, 1)], torch.zeros(2, 8))
