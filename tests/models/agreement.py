"""Two backends on the same weights must find the same numbers: shared by their tests."""

from typing import Any

import torch
from torch import Tensor

from tests.zoo import padded, random_tokens
from workbench.models.base import LAYER_SITES, MODEL_SITES, Site
from workbench.models.bridge_building import bridge_of
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.nnsight import NNsightModel
from workbench.models.nnsight_building import wrap_module
from workbench.models.transformer_lens import TransformerLensModel

BOUND = 1e-4
SITES = [Site(name, 1) for name in LAYER_SITES] + [Site(name) for name in MODEL_SITES]
LENGTHS = [12, 7, 4]

LIBRARY_WARNINGS = (
    # Deprecations inside the two libraries, at import; nothing of ours can change them.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::PendingDeprecationWarning",
)


def tokens() -> Tensor:
    return random_tokens(3)


def through_bridge(model: Any) -> TransformerLensModel:
    return TransformerLensModel(bridge_of(model))


def through_nnsight(model: Any) -> NNsightModel:
    return wrap_module(model)


def largest_difference(got: Tensor, wanted: Tensor, mask: Tensor | None, site: Site) -> float:
    """Over real tokens; hidden scores (-inf) must be hidden in both."""
    if site.name in ("pattern", "attn_scores"):
        got, wanted = got.transpose(1, 2), wanted.transpose(1, 2)
    if mask is not None:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    assert got.shape == wanted.shape
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    hidden = wanted == -torch.inf
    return float((got.masked_fill(hidden, 0.0) - wanted.masked_fill(hidden, 0.0)).abs().max())


def disagreements(model: Any, reference: Any, sites: list[Site], side: str | None) -> list[str]:
    """Sites (and the logits) at which the two differ by more than the bound."""
    prompts, mask = (tokens(), None) if side is None else padded(tokens(), LENGTHS, side)
    got = model.capture(prompts, sites, attention_mask=mask)
    wanted = reference.capture(prompts, sites, attention_mask=mask)
    wrong = [
        f"{site}: {found}"
        for site in sites
        if not (found := largest_difference(got[site], wanted[site], mask, site)) <= BOUND
    ]
    logits = [each.logits(prompts, mask) for each in (model, reference)]
    found = largest_difference(*logits, mask, Site("ln_final"))
    return wrong + ([] if found <= BOUND else [f"logits: {found}"])


def readable(model: HuggingFaceModel) -> list[Site]:
    """The sites that the hf backend reads on this architecture."""
    from workbench.errors import CapabilityError

    sites = []
    for site in SITES:
        try:
            model.capture(tokens(), [site])
        except CapabilityError:
            continue
        sites.append(site)
    return sites


def edited_logits(model: Any, edit: Any, side: str | None) -> Tensor:
    """Logits of the real tokens under an edit."""
    prompts, mask = (tokens(), None) if side is None else padded(tokens(), LENGTHS, side)
    with model.edit(edit):
        logits = model.logits(prompts, mask)
    return logits if mask is None else logits[mask.bool()]
