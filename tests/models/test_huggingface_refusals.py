"""What the hf backend refuses, in words that help."""

import pytest
import torch

import workbench as wb
from tests.zoo import (
    REFUSED_BY_HF,
    random_tokens,
    tiny_model,
)
from workbench.attention.interface import AttentionSession
from workbench.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    ModelError,
    UnknownNameError,
)
from workbench.models.inputs import prepare_inputs


@pytest.mark.parametrize("family", REFUSED_BY_HF)
def test_families_outside_the_interface_are_refused_with_a_backend_that_can(family):
    with pytest.raises(CapabilityError, match="transformer-lens or nnsight"):
        wb.wrap(tiny_model(family))


def test_unknown_site_offers_the_nearest():
    model = wb.wrap(tiny_model("gpt2"))
    with pytest.raises(UnknownNameError, match=r"L0\.pattern"):
        model.capture(random_tokens(), ["L0.patern"])
    with pytest.raises(UnknownNameError, match="Did you mean"):
        model.capture(random_tokens(), ["blocks.0.attn.hook_patern"])


def test_transformer_lens_names_find_the_same_sites():
    captured = wb.wrap(tiny_model("gpt2")).capture(
        random_tokens(), ["blocks.1.attn.hook_pattern", "hook_embed"]
    )
    assert torch.equal(captured["L1.pattern"], captured["blocks.1.attn.hook_pattern"])
    assert captured["embed"].shape == (2, 12, 32)
    with pytest.raises(KeyError, match=r"L0\.z was not captured"):
        captured["L0.z"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4), 101), r"0 \.\.\. 100.*got 101 in prompt 0 at position 0"),
        (torch.full((1, 4), -1), "got -1"),
        (torch.zeros(1, 65, dtype=torch.long), "at most n_ctx = 64"),
        (torch.zeros(4, dtype=torch.long), "a single prompt is"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 4), "int64"),
    ],
)
def test_impossible_tokens_are_refused(tokens, message):
    # Through prepare_inputs: the suite checks the shapes in the adapters' own signatures first.
    with pytest.raises(DataError, match=message):
        prepare_inputs(wb.wrap(tiny_model("gpt2")).spec, tokens)


def test_mask_with_a_hole_is_refused():
    with pytest.raises(DataError, match="holes"):
        wb.wrap(tiny_model("gpt2")).logits(random_tokens(1, 4), torch.tensor([[1, 0, 1, 1]]))


def test_layers_and_heads_that_do_not_exist_are_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="layer must be below 2"):
        model.capture(random_tokens(), ["L2.z"])
    with (
        pytest.raises(ConfigError, match="2 layers x 4 heads"),
        model.edit(wb.ZeroHeads(((0, 4),))),
    ):
        pass


def test_parallel_block_has_no_resid_mid():
    with pytest.raises(CapabilityError, match="parallel"):
        wb.wrap(tiny_model("gpt_neox")).capture(random_tokens(), ["L0.resid_mid"])


def test_mamba_has_residual_sites_only():
    model = wb.wrap(tiny_model("mamba"))
    assert "attention" not in model.capabilities
    with pytest.raises(CapabilityError, match="has none"):
        model.capture(random_tokens(), ["L0.pattern"])
    with pytest.raises(ConfigError, match="0 heads of mamba"), model.edit(wb.ZeroHeads(((0, 0),))):
        pass


def test_nan_weights_are_refused():
    inner = tiny_model("gpt2")
    with torch.no_grad():
        inner.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight"):
        wb.wrap(inner)


def test_other_stock_kernels_are_refused_by_name():
    model = wb.wrap(tiny_model("gpt2"))
    model.hooks.stock = "flash_attention_2"
    with pytest.raises(CapabilityError, match=r"loaded with flash_attention_2.*'sdpa'"):
        model.capture(random_tokens(), ["L0.z"])


def test_softcap_on_a_kernel_that_drops_it_is_refused():
    module = torch.nn.Identity()  # transformers 5.17 hands a softcap to SDPA
    session = AttentionSession("sdpa", {module: 0}, {}, {})
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(CapabilityError, match="attn_implementation='eager'"):
        session.attend(module, x, x, x, None, 1.0, {"softcap": 5.0})


def test_unknown_object_is_refused():
    with pytest.raises(ModelError, match=r"got builtins\.int"):
        wb.wrap(3)


def test_prompt_and_new_tokens_must_fit_learned_positions():
    with pytest.raises(DataError, match="60 \\+ 9"):
        wb.wrap(tiny_model("gpt2")).generate(random_tokens(1, 60), max_new_tokens=9)
