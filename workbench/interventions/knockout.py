"""Attention knockout: chosen queries cannot see chosen keys.

The scores of blocked edges become -inf before softmax, so that the rest of the row is renormalised:

    A'[q, k] = 0 if blocked, else A[q, k] / sum over keys j that are not blocked of A[q, j]

A query all of whose keys are blocked gets the output 0. In output form the rows of queries with a
blocked key are computed anew from q, k and v, exactly; no other row is touched.

Paper: Geva et al. 2023, "Dissecting Recall of Factual Associations", arXiv:2304.14767, section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.attention.streaming import AttentionInputs, PatternBlock, attend
from workbench.errors import CapabilityError, ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.models.base import ModelSpec

ROUNDING = 1e-5
"""A row that sums to less than 1 by more than this has a learned sink."""


@dataclass(frozen=True, eq=False)
class KnockOut:
    """Block edges from keys to queries in some heads.

    Positions count within the padded prompt; those past the tensor's end are never blocked, so that
    tokens that are generated see everything.
    """

    blocked: Bool[Tensor, "prompt q_pos k_pos"]
    """True: the query must not see the key. One pattern for all prompts (``prompt`` is 1) or one
    for each prompt of the forward pass."""
    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    name: str = "knock-out"

    @staticmethod
    def edges(
        edges: Iterable[tuple[int, int]], n_pos: int, heads: Heads | None = None
    ) -> "KnockOut":
        """Block (query, key) pairs, the same in every prompt.

        Raises:
            ConfigError: A position that does not lie in ``n_pos``.
        """
        blocked = torch.zeros(1, n_pos, n_pos, dtype=torch.bool)
        for query, key in edges:
            if not (0 <= query < n_pos and 0 <= key < n_pos):
                raise ConfigError(
                    f"edges must join positions in 0 ... {n_pos - 1}; got ({query}, {key})"
                )
            blocked[0, query, key] = True
        return KnockOut(blocked, heads)

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer; none if no edge is blocked."""
        grouped = heads_by_layer(self.heads, spec)
        if not bool(self.blocked.any()):
            return []
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            return self._recompute(call.inputs, z, heads)

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            n_q, n_k = pattern.shape[-2:]
            extra = n_k - n_q
            if n_q == n_k == self.blocked.shape[1] + 1 and int(first_key.min()) == 1:
                raise CapabilityError(
                    "knockout counts the prompt's own positions; a learned first token moves them; use "
                    "a model without one"
                )
            # Columns of learned keys stand before the first key; a cache's keys are behind it.
            learned = extra if extra and int(first_key.min()) >= extra else 0
            hidden = self._part(extra - learned, n_q, n_k - learned, pattern)
            return _without(pattern, torch.nn.functional.pad(hidden, (learned, 0)), heads)

        def tile(block: PatternBlock) -> Tensor:
            """The tile ``batch head q_pos k_pos`` without the blocked edges."""
            rows = self._part(0, block.rows.stop, block.columns.stop, block.pattern)
            rows = rows[:, block.rows, block.columns]
            hidden = rows if rows.shape[0] == 1 else rows[block.batches]
            return _without(block.pattern, hidden, heads)

        return AttentionEdit(layer, output, pattern, lambda call: tile)

    def _part(self, offset: int, n_q: int, n_k: int, like: Tensor) -> Bool[Tensor, "prompt q k"]:
        """What is blocked for queries ``offset ... offset + n_q - 1`` and the first ``n_k`` keys."""
        whole = self.blocked.to(like.device)
        size = offset + n_q
        grown = (0, max(0, n_k - whole.shape[2]), 0, max(0, size - whole.shape[1]))
        return torch.nn.functional.pad(whole, grown)[:, offset:size, :n_k]

    def _recompute(
        self,
        inputs: AttentionInputs,
        z: Float[Tensor, "batch q_pos head d_value"],
        heads: list[int],
    ) -> Float[Tensor, "batch q_pos head d_value"]:
        n_q, n_k = inputs.query.shape[2], inputs.key.shape[2]
        hidden = self._part(inputs.offset, n_q, n_k, z)[:, None]
        # What is not seen anyway needs no blocking: those rows stay as they are, bit for bit.
        touched = (hidden & inputs.visible()).any(dim=-1)
        rows = touched.any(dim=(0, 1)).nonzero()[:, 0]
        if not len(rows):
            return z
        hidden = hidden[:, :, rows]
        shown = inputs.mask if inputs.mask is not None else inputs.visible()
        shown = shown[..., :n_k].expand(-1, -1, n_q, -1)[:, :, rows]
        is_bool = shown.dtype == torch.bool
        mask = shown & ~hidden if is_bool else shown.masked_fill(hidden, -torch.inf)
        part = replace(inputs, query=inputs.query[:, :, rows], mask=mask, causal=False)
        found = attend(part, {}).output
        assert found is not None
        chosen = torch.zeros(z.shape[2], dtype=torch.bool, device=z.device)
        chosen[heads] = True
        change = touched[:, :, rows].transpose(1, 2) & chosen
        edited = z.clone()
        edited[:, rows] = torch.where(change[..., None], found.to(z.dtype), z[:, rows])
        return edited


def _without(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    hidden: Bool[Tensor, "prompt q_pos k_pos"],
    heads: list[int],
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """Zero what is hidden in some heads and renormalise the rows; a row with nothing left is 0."""
    whole = pattern[:, heads]
    kept = whole.masked_fill(hidden[:, None], 0.0)
    # A learned sink outside the pattern takes the rest of the row; without one the rest is rounding.
    sink = 1.0 - whole.sum(dim=-1, keepdim=True)
    total = kept.sum(dim=-1, keepdim=True) + torch.where(sink > ROUNDING, sink, 0.0)
    touched = hidden.any(dim=-1)[:, None, :, None] & (total > 0)
    edited = pattern.clone()
    edited[:, heads] = torch.where(touched, kept / total.clamp(min=1e-38), kept)
    return edited
