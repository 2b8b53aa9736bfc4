"""Replacing positions: what is kept stays, what is not is what was given."""

import pytest
import torch

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import random_tokens, tiny_model
from workbench.errors import ConfigError
from workbench.interventions.replace import ReplacePositions
from workbench.models.base import Site

KEEP = torch.ones(2, 12, dtype=torch.bool)
KEEP[0, 3:6] = False
KEEP[1, 0] = False
OTHER = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
EDIT = ReplacePositions("L1.resid_pre", KEEP, OTHER)


def test_kept_positions_stay_and_the_others_are_replaced():
    model = wb.wrap(tiny_model("llama"))
    tokens, site = random_tokens(2), Site("resid_pre", 1)
    before = model.capture(tokens, [site])[site]
    with model.edit(EDIT):
        after = model.capture(tokens, [site])[site]
    assert torch.equal(after, torch.where(KEEP[..., None], before, OTHER))


def test_keeping_everything_is_the_identity_bit_for_bit():
    model = wb.wrap(tiny_model("llama"))
    tokens = random_tokens(2)
    edit = ReplacePositions("L1.resid_pre", torch.ones_like(KEEP), OTHER)
    with model.edit(edit):
        found = model.logits(tokens)
    assert torch.equal(found, tiny_model("llama")(tokens).logits)


def test_keeping_nothing_is_the_other_prompt():
    model = wb.wrap(tiny_model("gpt2"))
    tokens, other = random_tokens(2), random_tokens(2, seed=5)
    site = Site("resid_pre", 1)
    replacement = model.capture(other, [site])[site]
    with model.edit(ReplacePositions("L1.resid_pre", torch.zeros_like(KEEP), replacement)):
        found = model.logits(tokens)
    torch.testing.assert_close(found, model.logits(other), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(*LIBRARY_WARNINGS)
@pytest.mark.parametrize("through", [through_bridge, through_nnsight])
def test_other_backends_agree(through):
    model = wb.wrap(tiny_model("gpt2"))
    other = through(tiny_model("gpt2", attn_implementation="eager"))
    tokens = random_tokens(2)
    with model.edit(EDIT), other.edit(EDIT):
        torch.testing.assert_close(other.logits(tokens), model.logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ReplacePositions("L0.z", KEEP, OTHER), "residual stream"),
        (ReplacePositions("L2.resid_pre", KEEP, OTHER), "below 2"),
        (ReplacePositions("L0.resid_pre", KEEP, OTHER[..., :3]), "replacement must be"),
    ],
    ids=["z", "layer", "width"],
)
def test_what_does_not_fit_is_refused(edit, message):
    with pytest.raises(ConfigError, match=message):
        edit.plan(wb.wrap(tiny_model("gpt2")).spec)


def test_another_batch_is_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with model.edit(EDIT), pytest.raises(ConfigError, match="one patch for each batch"):
        model.logits(random_tokens(3))
