"""The engine's edits against whole models run in plain tensors: logits, and tokens that are decoded."""

import pytest
import torch

import workbench as wb
from tests.interventions import eager
from tests.zoo import random_tokens, tiny_model

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
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, 6)
    with model.edit(edit):
        found = model.generate(tokens, max_new_tokens=10, do_sample=False, eos_token_id=None)
    with torch.no_grad(), eager.edited_by(model.model, **plain):
        logits = model.model(found, use_cache=False).logits
    assert torch.equal(found[:, 6:], logits[:, 5:-1].argmax(-1))
    assert found.shape == (2, 16)


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
