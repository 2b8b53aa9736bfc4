"""Keys and values of the positions before a change, made once and used by every pass after it.

A search that changes position p and later ones runs the model hundreds of times on the same first p
tokens. Their keys and values do not depend on what comes after, so they are computed once, without
a gradient graph; ``HuggingFaceModel.continue_from(..., prefix=...)`` then takes the residual stream
of the later positions alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter, ModelSpec
from workbench.models.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of some prompts, as every layer's attention keeps them."""

    cache: Any
    """A transformers ``DynamicCache``; a sliding window's layers keep their last tokens only."""
    n_prompts: int
    n_pos: int
    """Tokens of each prompt."""
    mask: Int[Tensor, "prompt pos"] | None = None
    """0 where padding is, on the left; None: there is none."""

    def select(self, rows: Int[Tensor, " row"]) -> "Prefix":
        """The prefixes of some prompts, in that order; a prompt may come more than once."""
        chosen = self.fresh()
        for layer in chosen.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, cache=chosen, n_prompts=len(rows), mask=mask)

    def fresh(self) -> Any:
        """A cache for one pass: it shares the tensors and may grow without changing this one."""
        # A pass puts longer tensors in the place of these; the tensors themselves stay as they are.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


def make_prefix(model: Any, arguments: dict[str, Any]) -> Prefix:
    """Run the first tokens through a transformers model and keep their keys and values.

    Args:
        model: With attention in every layer; unedited.
        arguments: Of its forward pass.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(**{**arguments, "use_cache": True, "past_key_values": cache})
    n_prompts, n_pos = arguments["input_ids"].shape
    return Prefix(cache, n_prompts, n_pos)


KeysValues = tuple[
    Float[Tensor, "prompt kv_head pos d_head"], Float[Tensor, "prompt kv_head pos d_value"]
]


def prefix_of_kept(
    config: Any, kept: Sequence[KeysValues], mask: Int[Tensor, "prompt pos"] | None, device: Any
) -> Prefix:
    """A prefix from keys and values that an earlier pass has made.

    Args:
        config: Of the model.
        kept: Of every layer, as its attention was given them.
        mask: 0 where padding is, on the left; None: there is none.
        device: Where the model runs.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys.to(device), values.to(device), layer)
    n_prompts, _, n_pos, _ = kept[0][0].shape
    padded = mask is not None and not bool(mask.all())
    return Prefix(cache, n_prompts, n_pos, mask if padded else None)


def check_prefixes(model: ModelAdapter) -> None:
    """Refuse a model whose prefix would not be what every later pass makes of the first tokens.

    Raises:
        CapabilityError: No attention, or edits are active (one may depend on the position).
    """
    spec = model.spec
    if spec.n_heads == 0 or model.interventions:
        found = "is edited" if spec.n_heads else f"({spec.family}) has none"
        raise CapabilityError(
            f"a prefix must be keys and values of an unedited model; {spec.name} {found}; continue from "
            "the whole residual stream, without prefix"
        )


def check_prefix(spec: ModelSpec, prefix: Prefix, inputs: Inputs) -> None:
    """Refuse a residual stream that does not go on from a prefix.

    Raises:
        DataError: Another number of prompts, too long together, or padding on the left.
    """
    batch, n_pos = inputs.tokens.shape
    if batch != prefix.n_prompts:
        raise DataError(
            f"a prefix must have one row a prompt; it has {prefix.n_prompts} and resid has {batch}; "
            "use prefix.select(rows)"
        )
    if prefix.n_pos + n_pos > spec.n_ctx:
        raise DataError(
            f"prefix and resid together must have at most n_ctx = {spec.n_ctx} positions for "
            f"{spec.name}; got {prefix.n_pos} + {n_pos}; shorten one"
        )
    mask = inputs.attention_mask
    if mask is None:
        return
    before = torch.ones(batch, dtype=torch.long) if prefix.mask is None else prefix.mask[:, -1]
    if bool((before.bool() & ~mask[:, 0].bool()).any()):
        raise DataError(
            "what follows a prefix must not begin with padding; got attention_mask with 0 in its "
            "first column; pad on the right"
        )


def with_prefix(arguments: dict[str, Any], prefix: Prefix) -> dict[str, Any]:
    """The arguments of a pass that goes on after a prefix."""
    mask, before = arguments.get("attention_mask"), prefix.mask
    whole: dict[str, Any] = {}
    if mask is not None or before is not None:
        tokens: Tensor = arguments["input_ids"]
        mask = torch.ones_like(tokens) if mask is None else mask
        before = mask.new_ones(len(tokens), prefix.n_pos) if before is None else before.to(mask)
        mask = torch.cat([before, mask], dim=1)
        whole["attention_mask"] = mask
        if prefix.mask is not None:
            # Positions count from a prompt's first real token.
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            whole["position_ids"] = positions[:, prefix.n_pos :]
    return {**arguments, **whole, "past_key_values": prefix.fresh(), "use_cache": True}


def prefix_of(model: ModelAdapter, tokens: Int[Tensor, "batch pos"]) -> Prefix | None:
    """A prefix where the model can use one; None where only the whole pass is right.

    Both give the same numbers; the whole pass takes longer. None for no tokens, for backends and
    architectures without such a cache, and under edits (an edit may depend on the position).
    """
    make = getattr(model, "prefix", None)
    if make is None or not tokens.shape[1] or model.interventions:
        return None
    try:
        found: Prefix = make(tokens)
    except CapabilityError:
        return None
    return found


def continue_after(
    model: Any,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    prefix: Prefix | None,
    last: int,
) -> Float[Tensor, "batch last d_vocab"]:
    """``model.continue_from`` with a prefix where there is one."""
    given = {} if prefix is None else {"prefix": prefix}
    logits: Tensor = model.continue_from(layer, resid, last=last, **given)
    return logits
