"""The hf backend against plain transformers, on every family."""

import pytest
import torch

import workbench as wb
from tests.models.stock import LEARNED_SINKS, TOLERANCE, eager_run, stock_logits
from tests.zoo import (
    ATTENTION_FAMILIES,
    FAMILIES,
    padded,
    random_tokens,
    tiny_model,
)
from workbench.attention.statistics import ColumnMean, RowEntropy, SinkMass
from workbench.errors import (
    CapabilityError,
)
from workbench.models.base import Site


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_reads_or_edits_are_bitwise_stock(family):
    tokens = random_tokens()
    model = tiny_model(family)
    expected = stock_logits(model, tokens)
    assert torch.equal(wb.wrap(model).logits(tokens), expected)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_pattern_equals_eager(family):
    tokens = random_tokens()
    expected = eager_run(family, tokens).attentions
    captured = wb.wrap(tiny_model(family)).capture(tokens, ["L0.pattern", "L1.pattern"])
    for layer in range(2):
        torch.testing.assert_close(captured[Site("pattern", layer)], expected[layer], **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_streamed_statistics_equal_those_of_the_eager_pattern(family):
    tokens = random_tokens()
    expected = eager_run(family, tokens).attentions
    wanted = {"received": ColumnMean(), "entropy": RowEntropy(), "mass": SinkMass((0, 2))}
    captured = wb.wrap(tiny_model(family)).capture(
        tokens, ["L0.pattern", "L1.pattern"], reduce={"pattern": wanted}
    )
    after = torch.arange(tokens.shape[1], 0, -1)
    for layer in range(2):
        found, pattern = captured[f"L{layer}.pattern"], expected[layer]
        torch.testing.assert_close(found["received"], pattern.sum(-2) / after, **TOLERANCE)
        torch.testing.assert_close(
            found["entropy"], torch.special.entr(pattern).sum(-1), **TOLERANCE
        )
        torch.testing.assert_close(found["mass"], pattern[..., [0, 2]].sum(-1), **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_hooked_forward_gives_the_same_residual_stream(family):
    tokens = random_tokens()
    hidden = eager_run(family, tokens).hidden_states
    sites = ["L0.pattern", "L0.resid_pre", "L1.resid_pre", "ln_final"]
    captured = wb.wrap(tiny_model(family)).capture(tokens, sites, reduce={"pattern": ColumnMean()})
    torch.testing.assert_close(captured["L0.resid_pre"], hidden[0], **TOLERANCE)
    torch.testing.assert_close(captured["L1.resid_pre"], hidden[1], **TOLERANCE)
    torch.testing.assert_close(captured["ln_final"], hidden[-1], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_is_the_sum_of_its_parts(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    parts = ["resid_pre", "mlp_out", "resid_post"]
    parts += ["attn_out"] if family != "mamba" else []
    parts += ["resid_mid"] if family not in ("mamba", "gpt_neox") else []
    found = model.capture(tokens, [f"L1.{part}" for part in parts])
    attn = found["L1.attn_out"] if "attn_out" in parts else 0.0
    total = found["L1.resid_pre"] + attn + found["L1.mlp_out"]
    torch.testing.assert_close(found["L1.resid_post"], total, **TOLERANCE)
    if "resid_mid" in parts:
        torch.testing.assert_close(found["L1.resid_mid"], found["L1.resid_pre"] + attn, **TOLERANCE)


@pytest.mark.parametrize(
    "family", [f for f in ATTENTION_FAMILIES if f not in ("olmo2", "gemma2", "gemma3_text")]
)
def test_w_o_turns_z_into_attn_out(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    found = model.capture(tokens, ["L1.z", "L1.attn_out"])
    through = torch.einsum("bphd,hdm->bpm", found["L1.z"], model.weight("W_O", 1))
    # What remains is the output projection's bias, the same at every position.
    bias = found["L1.attn_out"] - through
    torch.testing.assert_close(bias, bias[:1, :1].expand_as(bias), **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "phi3", "gpt_oss"])
def test_w_v_turns_the_normed_stream_into_v(family):
    tokens = random_tokens()
    model = tiny_model(family)
    wrapped = wb.wrap(model)
    block = wrapped.hooks.blocks[1]
    norm = next(
        m
        for n, m in block.named_children()
        if n in ("ln_1", "input_layernorm", "self_attn_layer_norm")
    )
    found = wrapped.capture(tokens, ["L1.v", "L1.resid_pre"])
    with torch.no_grad():
        normed = norm(found["L1.resid_pre"])
    through = torch.einsum("bpm,hmd->bphd", normed, wrapped.weight("W_V", 1))
    bias = found["L1.v"] - through
    torch.testing.assert_close(bias, bias[:1, :1].expand_as(bias), **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_scores_make_the_pattern(family):
    tokens = random_tokens()
    found = wb.wrap(tiny_model(family)).capture(tokens, ["L1.attn_scores", "L1.pattern"])
    pattern, scores = found["L1.pattern"], found["L1.attn_scores"]
    assert torch.equal(scores == -torch.inf, pattern == 0.0)
    softmax = scores.softmax(dim=-1)
    if family == LEARNED_SINKS:  # the learned sink takes a share of every row
        pattern = pattern / pattern.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(pattern, softmax, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_equals_unpadded(family, side):
    lengths = [12, 8]
    tokens, mask = padded(random_tokens(), lengths, side)
    model = wb.wrap(tiny_model(family))
    if family == "mamba" and side == "left":
        with pytest.raises(CapabilityError, match="pad on the right"):
            model.logits(tokens, mask)
        return
    logits = model.logits(tokens, mask)
    sites = ["L1.resid_post"] + (["L1.pattern"] if family != "mamba" else [])
    captured = model.capture(tokens, sites, reduce={"pattern": ColumnMean()}, attention_mask=mask)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        alone = tokens[row][real][None]
        torch.testing.assert_close(logits[row][real][None], model.logits(alone), **TOLERANCE)
        single = model.capture(alone, sites, reduce={"pattern": ColumnMean()})
        torch.testing.assert_close(
            captured["L1.resid_post"][row][real], single["L1.resid_post"][0], **TOLERANCE
        )
        if family != "mamba":
            torch.testing.assert_close(
                captured["L1.pattern"][row][:, real], single["L1.pattern"][0], **TOLERANCE
            )
            assert (captured["L1.pattern"][row][:, ~real] == 0).all()
        assert length == int(real.sum())


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_left_padded_entropy_and_mass_equal_the_prompt_alone(family):
    tokens, mask = padded(random_tokens(), [12, 8], "left")
    model = wb.wrap(tiny_model(family))
    wanted = {"entropy": RowEntropy(), "mass": SinkMass((4,))}
    found = model.capture(tokens, ["L0.pattern"], {"pattern": wanted}, attention_mask=mask)[
        "L0.pattern"
    ]
    alone = model.capture(
        tokens[1:, 4:], ["L0.pattern"], {"pattern": {**wanted, "mass": SinkMass((0,))}}
    )
    for name, expected in alone["L0.pattern"].items():
        torch.testing.assert_close(found[name][1, :, 4:], expected[0], **TOLERANCE)
        assert (found[name][1, :, :4] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_in_a_batch_equals_the_prompt_alone(family):
    tokens = random_tokens(3)
    model = wb.wrap(tiny_model(family))
    together = model.capture(tokens, ["L1.resid_post"])["L1.resid_post"]
    alone = model.capture(tokens[1:2], ["L1.resid_post"])["L1.resid_post"]
    torch.testing.assert_close(together[1:2], alone, **TOLERANCE)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_stock_output_and_float32_statistics(dtype):
    tokens = random_tokens()
    inner = tiny_model("llama").to(dtype)
    model = wb.wrap(inner)
    seen = {}

    def keep(statistic):
        captured = model.capture(tokens, ["L1.pattern", "L1.resid_post"], {"pattern": statistic})
        seen["resid"] = captured["L1.resid_post"]
        return captured["L1.pattern"]

    received = keep(ColumnMean())
    stock = model.capture(tokens, ["L1.resid_post"])["L1.resid_post"]
    assert received.dtype == torch.float32
    assert torch.equal(seen["resid"], stock)
    whole = model.capture(tokens, ["L1.pattern"])["L1.pattern"]
    after = torch.arange(tokens.shape[1], 0, -1)
    torch.testing.assert_close(received, whole.sum(-2) / after, **TOLERANCE)
