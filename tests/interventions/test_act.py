"""ACT against its definition written out row by row, in double precision."""

import pytest
import torch

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import ATTENTION_FAMILIES, padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.attention import streaming
from workbench.errors import ConfigError
from workbench.interventions.act import ACT, damp, damp_keys
from workbench.interventions.columns import EVERY, Columns
from workbench.models.base import Site
from workbench.models.toy import ToyAdapter

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

N_POS = 12
LOW = 1.2
"""An alpha that makes sinks of several keys of a short prompt."""


def defined(pattern, *, alpha, beta, mode, protect_first=True):
    """The rule, one head and one row at a time. ``[head q_pos k_pos]``, one unpadded prompt."""
    pattern = pattern.double()
    n_keys = pattern.shape[1]
    pattern, outside = pattern[..., :n_keys], pattern[..., n_keys:].sum(-1)
    edited = pattern.clone()
    n_heads, n_pos, _ = pattern.shape
    for head in range(n_heads):
        for row in range(n_pos):
            last = n_pos if mode == "full" else row + 1
            sinks = []
            for key in range(int(protect_first), row + 1):
                mean = sum(float(pattern[head, q, key]) for q in range(key, last)) / (last - key)
                if mean > alpha / last:
                    sinks.append(key)
            mass = sum(float(pattern[head, row, key]) for key in sinks)
            # 1 - m as what the others hold: in single precision rows sum to 1 only to 1e-7.
            rest = sum(float(pattern[head, row, key]) for key in range(row + 1) if key not in sinks)
            rest += float(outside[head, row])
            if not rest:
                continue
            for key in range(row + 1):
                if key in sinks:
                    edited[head, row, key] *= beta
                else:
                    edited[head, row, key] *= 1 + (1 - beta) * mass / rest
    return edited


def pattern_of(model, tokens, layer=0, mask=None):
    site = Site("pattern", layer)
    return model.capture(tokens, [site], attention_mask=mask)[site]


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_it_equals_its_definition_on_the_eager_pattern(family, mode):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, N_POS)
    stock = pattern_of(model, tokens)
    scores = model.capture(tokens, [Site("attn_scores", 0)])[Site("attn_scores", 0)].double()
    if family == "gpt_oss":  # a learned sink, as one more column
        sink = model.model.model.layers[0].self_attn.sinks.double()
        scores = torch.cat([scores, sink[:, None, None].expand(2, -1, N_POS, 1)], dim=-1)
    with model.edit(ACT(alpha=LOW, mode=mode)):
        edited = pattern_of(model, tokens)
    for prompt in range(2):
        wanted = defined(scores[prompt].softmax(-1), alpha=LOW, beta=0.4, mode=mode)
        torch.testing.assert_close(edited[prompt].double(), wanted, rtol=0, atol=1e-5)
    assert (edited - stock).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [0.5, LOW, 2.5])
@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("mode", ["causal", "full"])
def test_tiles_of_few_rows_look_at_the_keys_that_may_be_sinks_alone(
    mode, protect, alpha, monkeypatch
):
    monkeypatch.setattr(streaming, "TILE_ROWS", 3)
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 14)
    scores = model.capture(tokens, [Site("attn_scores", 0)])[Site("attn_scores", 0)].double()
    with model.edit(ACT(alpha=alpha, mode=mode, protect_first=protect)):
        edited = pattern_of(model, tokens)
    settings = {"alpha": alpha, "beta": 0.4, "mode": mode, "protect_first": protect}
    for prompt in range(2):
        wanted = defined(scores[prompt].softmax(-1), **settings)
        torch.testing.assert_close(edited[prompt].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chosen", [[2, 8, 12, 13], [3, 4, 5], [0, 2]])
@pytest.mark.parametrize("share", [0.5, 0.999999])
def test_sinks_among_a_few_keys_are_damped_as_among_all(share, chosen):
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, 3, 6, 14, generator=generator).double()
    here = torch.zeros(2, 3, 14, dtype=torch.bool)
    here[1, 2, chosen] = True
    keys = Columns.where(here)
    assert set(chosen) <= set(keys.of(torch.arange(14)).tolist())
    keys.put(pattern, keys.of(pattern) * share / (1 - share) * 2)
    pattern /= pattern.sum(-1, keepdim=True)
    everywhere = torch.rand(pattern.shape, generator=generator) < 0.6
    everywhere[:, :, 0] = False
    outside = torch.ones(14, dtype=torch.bool)
    keys.put(outside, torch.zeros_like(keys.of(outside)))
    everywhere[..., outside] = False
    sinks = keys.of(everywhere)
    wanted = damp(pattern, everywhere, 0.4)
    found = damp_keys(pattern.float(), keys, sinks, 0.4)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(found[:, :, 0], pattern[:, :, 0].float())


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
def test_the_output_is_the_edited_pattern_times_the_values(family, mode):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, N_POS)
    sites = [Site("pattern", 0), Site("v", 0), Site("z", 0)]
    with model.edit(ACT(alpha=LOW, mode=mode)):
        found = model.capture(tokens, sites)
        alone = model.capture(tokens, [Site("z", 0)])[Site("z", 0)]
    value = found["L0.v"].repeat_interleave(model.spec.n_heads // model.spec.n_kv_heads, dim=2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", found["L0.pattern"], value)
    torch.testing.assert_close(found["L0.z"], mixed, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, mixed, rtol=0, atol=1e-5)


def test_damped_rows_keep_their_sum_and_ratios():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, 3, 6, 6, generator=generator).softmax(-1).double()
    sinks = torch.rand(pattern.shape, generator=generator) < 0.3
    edited = damp(pattern.float(), sinks, 0.4).double()
    torch.testing.assert_close(edited.sum(-1), pattern.sum(-1), rtol=0, atol=1e-6)
    mass = (pattern * sinks).sum(-1)
    torch.testing.assert_close((edited * sinks).sum(-1), 0.4 * mass, rtol=0, atol=1e-6)
    # A query-dependent bias on the sinks' scores is the same map; a constant log beta is not.
    gain = 1 + 0.6 * mass / (1 - mass)
    bias = torch.where(sinks, torch.log(0.4 / gain)[..., None], 0.0)
    torch.testing.assert_close((pattern.log() + bias).softmax(-1), edited, rtol=0, atol=1e-6)
    constant = torch.where(sinks, torch.log(torch.tensor(0.4)), 0.0)
    assert ((pattern.log() + constant).softmax(-1) - edited).abs().max() > 0.01


def test_the_card_s_example_of_half_the_mass():
    pattern = torch.tensor([[[[0.5, 0.3, 0.2]]]])
    sinks = torch.tensor([[[[True, False, False]]]])
    torch.testing.assert_close(damp(pattern, sinks, 0.4), torch.tensor([[[[0.2, 0.48, 0.32]]]]))


def test_a_row_of_sinks_alone_and_one_without_sinks_stay():
    pattern = torch.tensor([[[[0.75, 0.25, 0.0], [0.2, 0.3, 0.5], [0.75, 0.25, 1e-42]]]])
    sinks = torch.tensor([[[[True, True, True], [False, False, False], [True, True, False]]]])
    assert torch.equal(damp(pattern, sinks, 0.4), pattern)
    assert torch.equal(damp_keys(pattern, EVERY, sinks, 0.4), pattern)


def test_the_least_that_is_no_sink_takes_what_is_freed():
    pattern, sinks = (
        torch.tensor([[[[0.75, 0.25, 1e-37]]]]),
        torch.tensor([[[[True, True, False]]]]),
    )
    expected = torch.tensor([[[[0.3, 0.1, 0.6]]]])
    torch.testing.assert_close(damp(pattern, sinks, 0.4), expected)
    torch.testing.assert_close(damp_keys(pattern, EVERY, sinks, 0.4), expected)


@pytest.mark.parametrize("edit", [ACT(beta=1.0), ACT(heads=())], ids=["beta 1", "no heads"])
def test_a_no_op_is_bitwise_the_stock_model(edit):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    stock = model.logits(tokens)
    with model.edit(edit):
        assert torch.equal(model.logits(tokens), stock)


def test_only_the_chosen_heads_change():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    stock = pattern_of(model, tokens, layer=1)
    with model.edit(ACT(alpha=LOW, heads=((1, 2),))):
        edited = pattern_of(model, tokens, layer=1)
    changed = (edited - stock).abs().amax(dim=(0, 2, 3))
    assert changed[2] > 0.01
    assert changed[[0, 1, 3]].max() == 0


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_the_first_token_is_damped_only_when_it_is_not_protected(mode):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(1, N_POS)
    stock = pattern_of(model, tokens)
    with model.edit(ACT(alpha=LOW, mode=mode, protect_first=False)):
        edited = pattern_of(model, tokens)
    wanted = defined(stock[0], alpha=LOW, beta=0.4, mode=mode, protect_first=False)
    torch.testing.assert_close(edited[0].double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(edited[:, :, 0], stock[:, :, 0])  # a row that sees only itself


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("backend", ["hf", "transformer-lens", "nnsight"])
def test_padded_equals_the_prompt_alone_on_every_backend(backend, mode, side):
    if backend == "hf":
        model = wb.wrap(tiny_model("llama"))
    elif backend == "nnsight":
        model = through_nnsight(tiny_model("llama", attn_implementation="eager"))
    else:
        model = through_bridge(tiny_model("llama"))
    reference = wb.wrap(tiny_model("llama"))
    whole = random_tokens(2, N_POS)
    tokens, mask = padded(whole, [N_POS, 7], side)
    edit = ACT(alpha=LOW, mode=mode)
    with model.edit(edit), reference.edit(edit):
        together = model.logits(tokens, mask)
        for row, length in enumerate([N_POS, 7]):
            alone = reference.logits(whole[row : row + 1, :length])[0]
            shown = together[row][mask[row].bool()]
            torch.testing.assert_close(shown, alone, rtol=0, atol=5e-5)


def test_a_prompt_of_many_tiles_equals_its_definition(monkeypatch):
    from workbench.attention import streaming

    monkeypatch.setattr(streaming, "TILE_FLOATS", 600)
    monkeypatch.setattr(streaming, "TILE_ROWS", 5)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", 2)
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(3, 40)
    stock = pattern_of(model, tokens)
    for mode in ("causal", "full"):
        with model.edit(ACT(alpha=2.0, mode=mode)):
            edited = pattern_of(model, tokens)
        for prompt in range(3):
            wanted = defined(stock[prompt], alpha=2.0, beta=0.4, mode=mode)
            torch.testing.assert_close(edited[prompt].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_decoding_equals_one_forward_pass_over_the_whole_text(family):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 6)
    edit = ACT(alpha=LOW, beta=0.2)
    with model.edit(edit):
        cached = model.generate(tokens, max_new_tokens=14, do_sample=False, eos_token_id=-1)
        uncached = model.generate(
            tokens, max_new_tokens=14, do_sample=False, eos_token_id=-1, use_cache=False
        )
        teacher = model.logits(cached)[:, 5:-1].argmax(dim=-1)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[:, 6:], teacher)
    with model.edit(edit):
        edited = model.logits(cached)
    assert (edited - model.logits(cached)).abs().max() > 0.01


def test_scores_of_decoded_tokens_equal_the_whole_pass_under_left_padding():
    model = wb.wrap(tiny_model("llama"))
    tokens, mask = padded(random_tokens(2, 8), [8, 5], "left")
    with model.edit(ACT(alpha=LOW, beta=0.2)):
        together = model.generate(tokens, max_new_tokens=10, attention_mask=mask, do_sample=False)
        for row, length in enumerate([8, 5]):
            alone = model.generate(
                tokens[row : row + 1, 8 - length :], max_new_tokens=10, do_sample=False
            )
            assert torch.equal(together[row, 8:], alone[0, length:])


def test_sampling_sees_the_same_edit_with_and_without_a_cache():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 6)
    with model.edit(ACT(alpha=LOW, beta=0.2)):
        torch.manual_seed(0)
        sampled = model.generate(tokens, max_new_tokens=8, do_sample=True)
        torch.manual_seed(0)
        again = model.generate(tokens, max_new_tokens=8, do_sample=True, use_cache=False)
    assert torch.equal(sampled, again)


@pytest.mark.parametrize("order", [0, 1])
def test_it_composes_with_zerotuning_in_the_order_given(order):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, N_POS)
    stock = pattern_of(model, tokens).double()

    def tuned(pattern):
        scaled = pattern.clone()
        scaled[..., 0] *= 3.0
        return scaled / scaled.sum(-1, keepdim=True)

    def acted(pattern):
        return torch.stack(
            [defined(prompt, alpha=LOW, beta=0.4, mode="full") for prompt in pattern]
        )

    edits = [wb.ZeroTuning(3.0), ACT(alpha=LOW, mode="full")]
    steps = [tuned, acted]
    if order:
        edits, steps = edits[::-1], steps[::-1]
    with model.edit(*edits):
        edited = pattern_of(model, tokens).double()
    torch.testing.assert_close(edited, steps[1](steps[0](stock)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "key", "sink-token"])
def test_on_a_toy_learned_keys_are_never_sinks(bias):
    sizes = {"d_vocab": 101, "n_layers": 1, "n_heads": 2, "d_model": 16, "n_ctx": 32}
    model = ToyAdapter(make_model(ToyModelConfig(**sizes, bias=bias), 0))
    tokens = random_tokens(2, N_POS)
    stock = pattern_of(model, tokens)
    with model.edit(ACT(alpha=0.9, mode="causal")):
        edited = pattern_of(model, tokens)
    # What a row lacks of 1 goes to the learned key: one more column for ``defined``.
    with_learned = torch.cat([stock, 1.0 - stock.sum(-1, keepdim=True)], dim=-1)
    wanted = torch.stack([defined(p, alpha=0.9, beta=0.4, mode="causal") for p in with_learned])
    torch.testing.assert_close(edited.double(), wanted, rtol=0, atol=1e-5)
    assert (edited - stock).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": -1.0}, "alpha"), ({"beta": 1.5}, "beta"), ({"mode": "both"}, "mode")],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ACT(**settings)


def test_a_whole_prompt_is_judged_in_generations_that_keep_it_and_see_it_at_once():
    whole, causal = ACT(mode="full"), ACT(mode="causal")
    for options in ({}, {"use_cache": True}, {"use_cache": None}):
        whole.check_generation(options)
    for options in ({"use_cache": False}, {"prefill_chunk_size": 4}):
        causal.check_generation(options)
        with pytest.raises(ConfigError, match="mode=full must"):
            whole.check_generation(options)


def test_a_file_brings_it_back():
    model = wb.wrap(tiny_model("llama"))
    content = {"name": "act", "alpha": 2.0, "beta": 0.5, "heads": [[0, 1]], "mode": "full"}
    with model.edit(content):
        assert model.interventions == (ACT(2.0, 0.5, ((0, 1),), True, "full"),)
