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
            target = self.rows[block.batches][prompt]
            target[block.heads, chosen, block.columns] = block.pattern[prompt, :, row].float()

    def finish(self) -> Float[Tensor, "batch head chosen k_pos"]:
        return self.rows


def rows_of_call(
    prompts: Float[Tensor, "prompt pos"], batch: int, n_q: int
) -> Float[Tensor, "batch q_pos"] | None:
    """Which rows of one call are real, from the mask of the prompts; None: all are new tokens.

    Beams and several samples repeat each prompt's row. Without a cache the tokens that were generated
    come after the prompt.
    """
    n_prompts, n_pos = prompts.shape
    if n_q < n_pos or batch % n_prompts:
        return None
    rows = torch.nn.functional.pad(prompts, (0, n_q - n_pos), value=1.0)
    return rows.repeat_interleave(batch // n_prompts, dim=0)
