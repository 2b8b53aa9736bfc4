"""Text encoders: every site against transformers' own eager pass, loading, and what they refuse."""

import pytest
import torch

import workbench as wb
from tests.encoders import save_encoder, tiny_clip, tiny_encoder
from workbench.errors import CapabilityError, ModelError
from workbench.interventions.act import ACT
from workbench.interventions.add_vector import AddVector
from workbench.interventions.knockout import KnockOut
from workbench.interventions.move_to_first import MoveToFirst
from workbench.interventions.replace import ReplacePositions
from workbench.interventions.uniform import UniformAttention
from workbench.interventions.zero_heads import ZeroHeads
from workbench.models.base import LAYER_SITES, Site

TOKENS = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([9, 6])[:, None]).long()
KINDS = ("clip", "t5")


def by_transformers(kind, mask=None):
    model = tiny_encoder(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(TOKENS, attention_mask=mask, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_sites_equal_those_of_eager_transformers(kind, mask):
    found = wb.wrap(tiny_encoder(kind)).capture(
        TOKENS,
        [Site(name, layer) for layer in (0, 1) for name in LAYER_SITES] + [Site("ln_final")],
        attention_mask=mask,
    )
    wanted = by_transformers(kind, mask)
    real = torch.ones(2, 9).bool() if mask is None else mask.bool()
    for layer in (0, 1):
        pattern = found[Site("pattern", layer)].transpose(1, 2)[real]
        torch.testing.assert_close(
            pattern, wanted.attentions[layer].transpose(1, 2)[real], rtol=1e-5, atol=1e-4
        )
        pre, post = found[Site("resid_pre", layer)], found[Site("resid_post", layer)]
        added = found[Site("attn_out", layer)] + found[Site("mlp_out", layer)]
        torch.testing.assert_close(
            pre[real], wanted.hidden_states[layer][real], rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close((pre + added)[real], post[real], rtol=1e-5, atol=1e-4)
    end = found[Site("ln_final")]
    torch.testing.assert_close(end[real], wanted.last_hidden_state[real], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_weights_make_what_attention_adds(kind):
    encoder = wb.wrap(tiny_encoder(kind))
    sites = ["L1.pattern", "L1.v", "L1.z", "L1.attn_out"]
    found = encoder.capture(TOKENS, sites)
    z = torch.einsum("bhqk,bkhd->bqhd", found["L1.pattern"], found["L1.v"])
    torch.testing.assert_close(found["L1.z"], z, rtol=1e-5, atol=1e-4)
    added = torch.einsum("bqhd,hdm->bqm", z, encoder.weight("W_O", 1))
    # CLIP's output projection has a bias: the same vector at every position.
    rest = found["L1.attn_out"] - added
    torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), rtol=1e-5, atol=1e-4)


def test_the_relative_bias_of_t5_is_in_the_scores():
    model = tiny_encoder("t5")
    found = wb.wrap(model).capture(TOKENS, ["L1.q", "L1.k", "L1.attn_scores"])
    plain = torch.einsum("bqhd,bkhd->bhqk", found["L1.q"], found["L1.k"])
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)
    torch.testing.assert_close(
        found["L1.attn_scores"] - plain, bias.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_clip_is_causal_and_t5_is_not(kind):
    pattern = wb.wrap(tiny_encoder(kind)).capture(TOKENS, ["L0.pattern"])["L0.pattern"]
    ahead = pattern.triu(1).sum().item()
    assert (ahead == 0.0) == (kind == "clip")


@pytest.mark.parametrize("kind", KINDS)
def test_edits_reach_the_end_and_a_no_op_does_not(kind):
    encoder = wb.wrap(tiny_encoder(kind))
    end = Site("ln_final")
    plain = encoder.capture(TOKENS, [end])[end]
    edits = [
        ZeroHeads(((0, 1),)),
        AddVector("L1.resid_pre", 10.0 * torch.arange(32.0)),
        KnockOut.edges([(5, key) for key in range(5)], 9),
    ]
    for edit in edits:
        with encoder.edit(edit):
            assert not torch.allclose(encoder.capture(TOKENS, [end])[end], plain, atol=1e-3)
    keep = torch.ones(2, 9, dtype=torch.bool)
    with encoder.edit(ReplacePositions("L1.resid_pre", keep, torch.zeros(2, 9, 32))):
        assert torch.equal(encoder.capture(TOKENS, [end])[end], plain)


PATTERN_EDITS = {
    "uniform": UniformAttention(),
    "uniform, first left out": UniformAttention(skip_first=True),
    "knock-out": KnockOut.edges([(1, 3), (4, 3)], 9),
    "move to first": MoveToFirst(),
    "act": ACT(alpha=1.2),
}


@pytest.mark.parametrize("edit", PATTERN_EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_an_edited_pattern_is_what_the_output_is_made_of(kind, edit):
    encoder, real = wb.wrap(tiny_encoder(kind)), MASK.bool()
    with encoder.edit(PATTERN_EDITS[edit]):
        alone = encoder.capture(TOKENS, ["L0.z"], attention_mask=MASK)["L0.z"]
        read = encoder.capture(TOKENS, ["L0.pattern", "L0.v"], attention_mask=MASK)
    pattern = read["L0.pattern"]
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, read["L0.v"])
    torch.testing.assert_close(alone[real], mixed[real], rtol=0, atol=1e-4)
    sums = pattern.sum(dim=-1).transpose(1, 2)[real]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    if edit == "uniform":
        for prompt, length in enumerate((9, 6)):
            seen = torch.ones(length, length)
            seen = seen.tril() if kind == "clip" else seen
            expected = seen / seen.sum(dim=-1, keepdim=True)
            assert torch.equal(pattern[prompt, 0, :length, :length], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_with_its_tokenizer(kind, tmp_path):
    encoder = wb.load(str(save_encoder(kind, tmp_path)))
    assert encoder.spec.family == {"clip": "clip_text_model", "t5": "t5"}[kind]
    assert encoder.spec.d_mlp == 48
    end = Site("ln_final")
    wanted = wb.wrap(tiny_encoder(kind)).capture(TOKENS, [end])[end]
    assert torch.equal(encoder.capture(TOKENS, [end])[end], wanted)
    assert encoder.tokenizer("the red cat")["input_ids"][-1] == 1


def test_the_text_tower_of_a_whole_clip_loads(tmp_path):
    whole = tiny_clip()
    whole.save_pretrained(tmp_path)
    end = Site("ln_final")
    with torch.no_grad():
        wanted = whole.text_model(TOKENS).last_hidden_state
    found = wb.load(str(tmp_path)).capture(TOKENS, [end])[end]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_whole_t5_loads_its_encoder_and_is_not_wrapped(tmp_path):
    from transformers import T5ForConditionalGeneration

    whole = T5ForConditionalGeneration(tiny_encoder("t5").config).eval()
    whole.save_pretrained(tmp_path)
    end = Site("ln_final")
    with torch.no_grad():
        wanted = whole.encoder(TOKENS).last_hidden_state
    found = wb.load(str(tmp_path)).capture(TOKENS, [end])[end]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(ModelError, match="T5EncoderModel"):
        wb.wrap(whole)


def test_an_encoder_refuses_what_needs_next_tokens():
    encoder = wb.wrap(tiny_encoder("clip"))
    assert not encoder.capabilities & {"generate", "continue", "gradients"}
    calls = (
        lambda: encoder.logits(TOKENS),
        lambda: encoder.generate(TOKENS),
        lambda: encoder.weight("W_U"),
        lambda: encoder.continue_from(0, torch.zeros(2, 9, 32)),
    )
    for call in calls:
        with pytest.raises(CapabilityError, match="text encoder"):
            call()


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_other_backends_refuse_an_encoder(backend, tmp_path):
    with pytest.raises(CapabilityError, match="--backend hf"):
        wb.load(str(save_encoder("t5", tmp_path)), backend=backend)
