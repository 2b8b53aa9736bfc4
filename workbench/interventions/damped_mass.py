"""How much attention ACT would damp, as a statistic of the pattern: where it is 0 the edit does nothing."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import TiledCall
from workbench.attention.streaming import (
    PatternAccumulator,
    PatternBlock,
    PatternShape,
    PatternStatistic,
)
from workbench.interventions.act import ACT
from workbench.interventions.running_columns import Place, RunningColumns


@dataclass(frozen=True)
class DampedMass(PatternStatistic):
    """The attention that ACT would damp, summed over all rows. ``[batch head]``; 0: it does nothing.

    Padding must be on the left or known by rows; the mode is that of the intervention.
    """

    act: ACT

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _DampedMass(self.act, shape)


class _DampedMass(PatternAccumulator):
    def __init__(self, act: ACT, shape: PatternShape) -> None:
        valid = shape.row_valid
        first = torch.zeros(shape.batch, dtype=torch.long, device=shape.device)
        n_tokens = first + shape.n_q
        if valid is not None:
            first, n_tokens = valid.argmax(dim=1), valid.sum(dim=1).long()
        self._call = TiledCall(0, 0, first, n_tokens, _not_asked, _not_asked)
        self._act, self._n_keys = act, shape.n_k
        # Tiles of long prompts hold some of the heads only: each part of the heads has its own sums.
        self._columns: defaultdict[int, RunningColumns] = defaultdict(RunningColumns)
        self._mass = torch.zeros(shape.batch, shape.n_heads, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        place, part = Place(self._call, block), block.pattern.float()
        columns = self._columns[block.heads.start]
        if self._act.mode == "full":
            columns.add(place, part)
            return
        sinks = columns.advance(place, part) > self._act.bound(place)
        self._mass[block.batches, block.heads] += part.masked_fill(~sinks, 0.0).sum(dim=(-1, -2))

    def finish(self) -> Float[Tensor, "batch head"]:
        if self._act.mode == "causal":
            return self._mass
        parts = [self._columns[start].total for start in sorted(self._columns)]
        total = torch.cat([part[..., : self._n_keys] for part in parts], dim=1)
        keys = torch.arange(total.shape[-1], device=total.device)
        first, n_tokens = self._call.first_key[:, None], self._call.n_tokens[:, None]
        after = (first + n_tokens - keys).clamp(min=1)[:, None]
        judged = (keys > first if self._act.protect_first else keys >= first)[:, None]
        sinks = judged & (total / after * n_tokens[:, None] > self._act.alpha)
        return total.masked_fill(~sinks, 0.0).sum(dim=-1)


def _not_asked(*_: Any) -> Tensor:
    raise AssertionError("a statistic asks for neither scores nor means")
