"""Attention knockout: chosen queries cannot see chosen keys.

The scores of blocked edges become -inf before softmax, so that the rest of the row is renormalised:

    A'[q, k] = 0 if blocked, else A[q, k] / sum over keys j that are not blocked of A[q, j]

A query all of whose keys are blocked gets the output 0. In output form the rows of queries with a
blocked key are computed anew from q, k and v, exactly; no other row is touched. Where a pattern must be
changed, a row that left nothing of its precision to other keys becomes 0 as well.

Paper: Geva et al. 2023, "Dissecting Recall of Factual Associations", arXiv:2304.14767, section 3.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit, TiledCall
from workbench.attention.streaming import PatternBlock, attend
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.interventions.running_columns import Place
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
            return self._recompute(call, z, heads)

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            """What changes the tiles of one call."""

            def tile(block: PatternBlock) -> Tensor:
                """The tile ``batch head q_pos k_pos`` without the blocked edges."""
                place = Place(call, block)
                hidden = self._among(place.rows[:, 0], place.keys, call.first_key.shape[0])
                hidden = hidden if hidden.shape[0] == 1 else hidden[block.batches]
                return _without(block.pattern, hidden, heads)

            return tile

        return AttentionEdit(layer, output, None, begin)

    def _among(
        self, queries: Int[Tensor, " q_pos"], keys: Int[Tensor, " k_pos"], batch: int
    ) -> Bool[Tensor, "#batch q_pos k_pos"]:
        """What is blocked among some positions; those that the tensor does not have are not."""
        n_prompts, n_q, n_k = self.blocked.shape
        if batch % n_prompts:
            raise ConfigError(
                f"blocked must hold one pattern, or one for each prompt; got {n_prompts} for a batch of "
                f"{batch}; make one knockout for each batch"
            )
        blocked = self.blocked.to(queries.device)[:, queries.clamp(0, n_q - 1)]
        blocked = blocked[:, :, keys.clamp(0, n_k - 1)]
        inside = (queries >= 0) & (queries < n_q)
        hidden = blocked & inside[:, None] & (keys >= 0) & (keys < n_k)
        # Beams and several samples repeat each prompt's row.
        return hidden if n_prompts == 1 else hidden.repeat_interleave(batch // n_prompts, dim=0)

    def _recompute(
        self,
        call: AttentionCall,
        z: Float[Tensor, "batch q_pos head d_value"],
        heads: list[int],
    ) -> Float[Tensor, "batch q_pos head d_value"]:
        inputs = call.inputs
        n_q, n_k = inputs.query.shape[2], inputs.key.shape[2]
        keys = torch.arange(n_k, device=z.device) + call.first_column
        hidden = self._among(keys[inputs.offset :], keys, z.shape[0])[:, None]
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
