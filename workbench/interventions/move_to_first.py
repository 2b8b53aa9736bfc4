"""Move heads to the first token: all their attention goes there.

    A'[q, k] = 1 for the first token, 0 else;    z' = v_0

A query that cannot see the first token (behind a sliding window) keeps its row. The card calls it
"move to BOS". Card: active_dormant section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.interventions.base import Heads, heads_by_layer
from workbench.interventions.uniform import visible_keys
from workbench.models.base import ModelSpec


@dataclass(frozen=True)
class MoveToFirst:
    """Send all attention of some heads to the first token."""

    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    name: str = "move-to-first"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer."""
        grouped = heads_by_layer(self.heads, spec)
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            first = call.first_key_index()[:, None]
            seen = (call.scores(first) > -torch.inf)[:, heads].transpose(1, 2)
            value = call.values(first)[:, heads].transpose(1, 2)
            edited = z.clone()
            edited[:, :, heads] = torch.where(seen, value.to(z.dtype), z[:, :, heads])
            return edited

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            keys = torch.arange(pattern.shape[-1], device=pattern.device)
            first = (keys == first_key.to(pattern.device)[:, None])[:, None, None]
            seen = (visible_keys(pattern, first_key) & first).any(dim=-1, keepdim=True)
            edited = pattern.clone()
            edited[:, heads] = torch.where(seen, first.to(pattern.dtype), pattern[:, heads])
            return edited

        return AttentionEdit(layer, output, pattern)
