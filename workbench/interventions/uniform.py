"""Uniform attention: every query attends equally to all keys it can see.

The baseline of the association bias: what attention adds beyond an average of the prefix. With n
visible keys, A'[q, k] = 1/n; in output form z' is the mean of the visible values. A sliding window
stays a window, padding stays hidden, and learned sinks get nothing: rows sum to 1.

Paper: Singh 2023, arXiv:2308.10874 (association bias). Card: embedding_walk section 5, ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.attention.scores import wide
from workbench.interventions.base import Heads, heads_by_layer
from workbench.models.base import ModelSpec


@dataclass(frozen=True)
class UniformAttention:
    """Replace the attention of some heads by a uniform one."""

    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    skip_first: bool = False
    """Leave out the first token (BOS), except for queries that see nothing else."""
    name: str = "uniform-attention"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer."""
        grouped = heads_by_layer(self.heads, spec)
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            edited = z.clone()
            edited[:, :, heads] = self._mean_value(call)[:, :, heads].to(z.dtype)
            return edited

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            weights = uniform_weights(
                visible_keys(pattern, first_key), first_key, skip_first=self.skip_first
            )
            edited = pattern.clone()
            edited[:, heads] = weights.expand(-1, len(heads), -1, -1)
            return edited

        return AttentionEdit(layer, output, pattern)

    def _mean_value(self, call: AttentionCall) -> Float[Tensor, "batch q_pos head d_value"]:
        inputs = call.inputs
        value = wide(inputs.value)
        if inputs.mask is None and inputs.causal and not self.skip_first:
            # Running means: no q_pos x k_pos matrix, however long the prompt.
            count = torch.arange(1, value.shape[2] + 1, device=value.device)
            mean = (value.cumsum(dim=2) / count[:, None])[:, :, inputs.offset :]
        else:
            first = call.first_key_index()
            weights = uniform_weights(inputs.visible(), first, skip_first=self.skip_first)
            mean = weights.to(value) @ value
        return mean.repeat_interleave(inputs.n_groups, dim=1).transpose(1, 2)


def uniform_weights(
    visible: Bool[Tensor, "#batch #head q_pos k_pos"],
    first_key: Int[Tensor, " first"],
    *,
    skip_first: bool,
) -> Float[Tensor, "batch one q_pos k_pos"]:
    """Equal weights on the visible keys of each query; a row that sees nothing is zero."""
    visible = visible[:, :1]
    if skip_first:
        keys = torch.arange(visible.shape[-1], device=visible.device)
        rest = visible & (keys != first_key.to(visible.device)[:, None, None, None])
        visible = torch.where(rest.any(dim=-1, keepdim=True), rest, visible)
    count = visible.sum(dim=-1, keepdim=True).clamp(min=1)
    return visible.float() / count


def visible_keys(
    pattern: Float[Tensor, "batch head q_pos k_pos"], first_key: Int[Tensor, " first"]
) -> Bool[Tensor, "batch one q_pos k_pos"]:
    """Which keys a query may see, from a pattern whose last query stands at the last key.

    Causal: from the first key that this query or a later one attends to (windows only move on), to
    the query itself. Where a query attends to what comes after it, every query sees the same keys. An
    entry inside that range may be 0 by underflow and is visible all the same.
    """
    n_q, n_k = pattern.shape[-2:]
    keys = torch.arange(n_k, device=pattern.device)
    last = torch.arange(n_q, device=pattern.device)[:, None] + (n_k - n_q)
    first = first_key.to(pattern.device)[:, None, None, None]
    attended = (pattern > 0).any(dim=1, keepdim=True)
    # Rows of padding, before the first key, may hold anything.
    real = attended & (last >= first)
    if bool((real & (keys > last)).any()):
        return real.any(dim=-2, keepdim=True).expand_as(real)
    start = torch.where(attended.any(dim=-1), attended.float().argmax(dim=-1), n_k)
    start = start.flip(-1).cummin(dim=-1).values.flip(-1)
    return (keys >= start[..., None]) & (keys >= first) & (keys <= last)
