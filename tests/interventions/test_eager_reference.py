"""The engine's edits against whole models run in plain tensors: logits, and tokens that are decoded."""

import pytest
import torch

import workbench as wb
from tests.interventions import eager
from tests.zoo import padded, random_tokens, tiny_model

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]
"""Plain; grouped queries; a sliding window of 5; capped scores; learned sinks."""
GAMMAS = (2.5, 0.4, 1.0, 6.0)
BY_HEAD = wb.ZeroTuning(GAMMAS * 2)
LOW = 1.2

RULES = {
    "score": (wb.ZeroTuning(3.0), {"rule": eager.zerotuning((3.0,) * 4)}),
    "score by head": (BY_HEAD, {"rule": eager.zerotuning(GAMMAS)}),
    "key": (wb.ZeroTuning(1.5, mode="key"), {"key_factor": 1.5}),
    "act causal": (wb.ACT(alpha=LOW, beta=0.2), {"rule": eager.act(LOW, 0.2, "causal")}),
    "act full": (wb.ACT(alpha=LOW, mode="full"), {"rule": eager.act(LOW, 0.4, "full")}),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_plain_model(family, name):
    edit, plain = RULES[name]
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2)
    stock = model.logits(tokens)
    with torch.no_grad(), eager.edited_by(model.model, **plain):
        wanted = model.model(tokens, use_cache=False).logits
    with model.edit(edit):
        found = model.logits(tokens)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=1e-5)
    assert (found - stock).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("name", [name for name in RULES if name != "act full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_decoded_with_a_cache_are_those_of_the_plain_model(family, name):
    edit, plain = RULES[name]
    model = wb.wrap(tiny_model(family))
    compare_decoding(model, edit, plain, 1e-5)


def compare_decoding(model, edit, plain, tolerance):
    """Every step's logits of a left-padded batch against each text run alone, whole, in plain tensors."""
    tokens, mask = padded(random_tokens(2, 6), [6, 4], "left")
    steps = []
    hook = model.model.register_forward_hook(
        lambda module, args, found: steps.append(found.logits[:, -1])
    )
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    with hook, model.edit(edit):
        found = model.generate(tokens, attention_mask=mask, **options)
    decoded = torch.stack(steps, dim=1)
    assert found.shape == (2, 16)
    for row, length in enumerate([6, 4]):
        text = found[row : row + 1, 6 - length :]
        with torch.no_grad(), eager.edited_by(model.model, **plain):
            logits = model.model(text, use_cache=False).logits[0, length - 1 : -1]
        assert torch.equal(found[row, 6:], logits.argmax(-1))
        scale = logits.abs().max()
        torch.testing.assert_close(decoded[row] / scale, logits / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_prompt_equals_the_plain_one(family, name):
    edit, plain = RULES[name]
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    with torch.no_grad(), eager.edited_by(model.model, **plain):
        wanted = model.model(tokens[1:, 4:], use_cache=False).logits[0]
    with model.edit(edit):
        found = model.logits(tokens, mask)[1, 4:]
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # eager kernels go through float32
def test_a_float64_model_is_edited_in_float64(family, name):
    edit, plain = RULES[name]
    model, tokens = wb.wrap(tiny_model(family).double()), random_tokens(2)
    seen = []
    with torch.no_grad(), eager.edited_by(model.model, **plain):
        wanted = model.model(tokens, use_cache=False).logits
    with model.edit(edit), model.model.register_forward_hook(lambda *_: seen.append(_[-1].logits)):
        model.logits(tokens)
    scale = wanted.abs().max()
    torch.testing.assert_close(seen[0] / scale, wanted / scale, rtol=0, atol=1e-13)
    if name != "act full":
        compare_decoding(model, edit, plain, 1e-13)


HALF = 2.0**-6
"""Two spacings of bfloat16 below 1. The kernel rounds the weights and then z to it; what the edit adds
is float32 and rounded once."""


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_first_layer_lies_within_two_spacings(family, name):
    edit, plain = RULES[name]
    model, tokens = wb.wrap(tiny_model(family).to(torch.bfloat16)), random_tokens(2)
    value = model.capture(tokens, ["L0.v"])["L0.v"]
    with model.edit(edit):
        found = model.capture(tokens, ["L0.z"])["L0.z"]
    seen = []
    projection = model.model.get_submodule(f"{model.family.blocks}.0.{model.family.attn}")._modules[
        "c_proj" if family == "gpt2" else "o_proj"
    ]
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), eager.edited_by(model.model, **plain):
        model.model(tokens, use_cache=False)
    hook.remove()
    wanted = seen[0].float().view_as(found)
    scale = value.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=HALF)
