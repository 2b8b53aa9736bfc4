"""Scale the attention to any set of keys and renormalise the rows.

With K the set, a the attention of one query and a_K its mass on K:

    a'_k = g a_k / D  for k in K,    a'_k = a_k / D  else,    D = 1 + (g - 1) a_K

In output form only the keys of K are gathered: o' = (o + (g - 1) sum over K of a_k v_k) / D.
``ZeroTuning`` is the case K = {first token}. Card: zerotuning sections 1-2, for any key.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.attention.scores import wide
from workbench.errors import ConfigError
from workbench.interventions.base import LARGEST_FACTOR, Heads, heads_by_layer
from workbench.models.base import ModelSpec

ROUNDING = 2e-6
"""A row that sums to less than 1 by more than this has a learned sink, or is padding."""


@dataclass(frozen=True)
class ScaleKeys:
    """Scale the attention of some heads to chosen positions of the prompt."""

    positions: tuple[int, ...]
    """Counted from each prompt's first token."""
    factor: float
    """Above 0; 1 changes nothing."""
    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    name: str = "scale-keys"

    def __post_init__(self) -> None:
        if not 0.0 < self.factor <= LARGEST_FACTOR:
            raise ConfigError(
                f"factor must be above 0 and at most {LARGEST_FACTOR:g}; got {self.factor}; 1 changes "
                "nothing"
            )
        if len(set(self.positions)) < len(self.positions) or min(self.positions, default=0) < 0:
            raise ConfigError(
                f"positions must be different and 0 or more; got {', '.join(map(str, self.positions))}"
            )

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer; none for a factor of 1 or no positions."""
        grouped = heads_by_layer(self.heads, spec)
        if self.factor == 1.0 or not self.positions:
            return []
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            columns = call.columns(self.positions)
            weights, values = call.weights(columns)[:, heads], call.values(columns)[:, heads]
            edited = z.clone()
            scaled = scale_mixed(z[:, :, heads], weights, values, self.factor)
            edited[:, :, heads] = scaled.to(z.dtype)
            return edited

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            edited = pattern.clone()
            columns = first_key[:, None] + torch.tensor(self.positions, device=pattern.device)
            edited[:, heads] = scale_columns(pattern[:, heads], columns, self.factor)
            return edited

        # Under a factor below 1 a row that is all on the keys has D = factor.
        return AttentionEdit(layer, output, pattern, gain=1.0 / min(1.0, self.factor))


def scale_mixed(
    z: Float[Tensor, "batch q_pos head d_value"],
    weights: Float[Tensor, "batch head q_pos n"],
    values: Float[Tensor, "batch head n d_value"],
    factor: float,
) -> Float[Tensor, "batch q_pos head d_value"]:
    """The output form: from z, the weights on the keys and their values."""
    leverage = (factor - 1.0) * weights
    mixed = (leverage @ values).transpose(1, 2)
    return (wide(z) + mixed) / (1.0 + leverage.sum(dim=-1).transpose(1, 2)[..., None])


def scale_columns(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    columns: Int[Tensor, "batch n"],
    factor: float,
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """The definition on the pattern: scale the columns that are there, renormalise the rows."""
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    chosen = (columns[..., None] == keys).any(dim=1)[:, None, None]
    scaled = torch.where(chosen, factor * pattern, pattern)
    # D as a sum of what is there: 1 + (factor - 1) a_K has no digits left where it is near 0.
    outside = 1.0 - pattern.sum(dim=-1, keepdim=True)
    total = scaled.sum(dim=-1, keepdim=True) + torch.where(outside > ROUNDING, outside, 0.0)
    touched = (pattern.masked_fill(~chosen, 0.0).sum(dim=-1, keepdim=True) > 0.0) & (total > 0.0)
    return torch.where(touched, scaled / total, pattern)
