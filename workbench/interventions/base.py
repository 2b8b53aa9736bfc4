"""Small edits that people expect: silence heads, add a vector. One dataclass each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import EDITABLE_SITES, ActivationEdit, Edit
from workbench.errors import ConfigError
from workbench.models.base import ModelSpec, Site

Heads = tuple[tuple[int, int], ...]
"""(layer, head) pairs, counted from 0."""


def heads_by_layer(heads: Sequence[Sequence[int]] | None, spec: ModelSpec) -> dict[int, list[int]]:
    """Group (layer, head) pairs by layer; None stands for every head.

    Raises:
        ConfigError: The model has no such head.
    """
    if heads is None:
        return {layer: list(range(spec.n_heads)) for layer in range(spec.n_layers)}
    grouped: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < spec.n_layers and 0 <= head < spec.n_heads):
            raise ConfigError(
                f"heads must lie in {spec.n_layers} layers x {spec.n_heads} heads of {spec.name}; "
                f"got layer {layer}, head {head}; choose a head that exists"
            )
        grouped.setdefault(layer, []).append(head)
    return grouped


@dataclass(frozen=True)
class ZeroHeads:
    """Set the output z of some heads to zero (before W_O), at every position."""

    heads: Heads
    name: str = "zero-heads"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer."""
        return [
            ActivationEdit(Site("z", layer), _zero(heads))
            for layer, heads in heads_by_layer(self.heads, spec).items()
        ]


def _zero(heads: list[int]):  # type: ignore[no-untyped-def]
    def change(z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        kept = z.clone()
        kept[:, :, heads] = 0.0
        return kept

    return change


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add a vector to the residual stream at one site, at every position (steering).

    A zero vector is a no-op.
    """

    site: str
    """E.g. ``L3.resid_pre``; any site of the residual stream."""
    vector: Float[Tensor, " d_model"]
    scale: float = 1.0
    name: str = "add-vector"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit at the site, none if the vector is zero."""
        site = Site.parse(self.site)
        if site.name not in EDITABLE_SITES - {"z"}:
            raise ConfigError(
                f"site must be in the residual stream; got {site}; use e.g. L0.resid_post"
            )
        if site.layer is not None and site.layer >= spec.n_layers:
            raise ConfigError(f"layer must be below {spec.n_layers}; got {site}")
        if self.vector.shape != (spec.d_model,):
            raise ConfigError(
                f"vector must have d_model = {spec.d_model} numbers; got {tuple(self.vector.shape)}"
            )
        if self.scale == 0.0 or not torch.any(self.vector):
            return []
        return [ActivationEdit(site, self._add)]

    def _add(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return x + (self.scale * self.vector).to(x)
