"""Some rows of the attention pattern, kept while the rest is forgotten."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.streaming import (
    PatternAccumulator,
    PatternBlock,
    PatternShape,
    PatternStatistic,
)


@dataclass(frozen=True, eq=False)
class PatternRows(PatternStatistic):
    """The attention of chosen queries, by prompt. ``[batch head chosen k_pos]``."""

    queries: Int[Tensor, "batch chosen"]
    """Positions of the chosen queries of each prompt, from 0."""

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _PatternRows(shape, self.queries)


class _PatternRows(PatternAccumulator):
    def __init__(self, shape: PatternShape, queries: Tensor) -> None:
        size = (shape.batch, shape.n_heads, queries.shape[1], shape.n_k)
        self.queries = queries.to(shape.device)
        self.rows = torch.zeros(size, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        queries = self.queries[block.batches]
        inside = (queries >= block.rows.start) & (queries < block.rows.stop)
        for prompt, chosen in inside.nonzero().tolist():
            row = int(queries[prompt, chosen]) - block.rows.start
            target = self.rows[(block.batches.start or 0) + prompt]
            target[block.heads, chosen, block.columns] = block.pattern[prompt, :, row].float()

    def finish(self) -> Float[Tensor, "batch head chosen k_pos"]:
        return self.rows
