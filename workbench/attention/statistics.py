"""Statistics of the attention pattern that are collected block by block.

Ask for them with ``capture(..., reduce={"pattern": ColumnMean()})``, or several at once with
``{"pattern": {"received": ColumnMean(), "entropy": RowEntropy()}}``. All accumulate in float32.
Rows that are padding count for nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.streaming import (
    PatternAccumulator,
    PatternBlock,
    PatternShape,
    PatternStatistic,
)


@dataclass(frozen=True)
class ColumnMean(PatternStatistic):
    """Mean attention each key receives: alpha[k] = 1/(T - k) * sum over q >= k of P[q, k].

    T is the prompt's own length, so padding changes nothing; keys that are padding get 0.
    ``[batch head k_pos]``. Card: attention_sink section 1.
    """

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _ColumnMean(shape)


class _ColumnMean(PatternAccumulator):
    def __init__(self, shape: PatternShape) -> None:
        self.shape = shape
        self.total = torch.zeros(shape.batch, shape.n_heads, shape.n_k, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        if block.row_valid is None:
            received = block.pattern.sum(dim=-2)
        else:
            received = torch.matmul(block.row_valid[:, None, None], block.pattern)[..., 0, :]
        self.total[block.batches, block.heads, block.columns] += received

    def finish(self) -> Float[Tensor, "batch head k_pos"]:
        shape = self.shape
        if shape.row_valid is None:
            # Queries at or after key k; with a KV cache the first queries are not in this call.
            after = torch.arange(shape.n_k, 0, -1, device=shape.device).clamp(max=shape.n_q)
            return self.total / after
        after = shape.row_valid.flip(-1).cumsum(-1).flip(-1)
        return self.total / after.clamp(min=1.0)[:, None]


@dataclass(frozen=True)
class SinkMass(PatternStatistic):
    """Attention every query pays to one set of keys. ``[batch head q_pos]``, 0 for padding."""

    positions: tuple[int, ...] = (0,)

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _SinkMass(shape, self.positions)


class _SinkMass(PatternAccumulator):
    def __init__(self, shape: PatternShape, positions: tuple[int, ...]) -> None:
        self.mass = torch.zeros(shape.batch, shape.n_heads, shape.n_q, device=shape.device)
        self.positions = positions

    def update(self, block: PatternBlock) -> None:
        inside = [pos for pos in self.positions if pos < block.columns.stop]
        mass = block.pattern[..., inside].sum(dim=-1)
        self.mass[block.batches, block.heads, block.rows] = _real_rows(mass, block)

    def finish(self) -> Float[Tensor, "batch head q_pos"]:
        return self.mass


@dataclass(frozen=True)
class RowEntropy(PatternStatistic):
    """Entropy of every query's attention, in nats. ``[batch head q_pos]``, 0 for padding."""

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _RowEntropy(shape)


class _RowEntropy(PatternAccumulator):
    def __init__(self, shape: PatternShape) -> None:
        self.entropy = torch.zeros(shape.batch, shape.n_heads, shape.n_q, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        # special.entr is -p log p with entr(0) = 0.
        entropy = torch.special.entr(block.pattern).sum(dim=-1)
        self.entropy[block.batches, block.heads, block.rows] = _real_rows(entropy, block)

    def finish(self) -> Float[Tensor, "batch head q_pos"]:
        return self.entropy


@dataclass(frozen=True)
class WholePattern(PatternStatistic):
    """The pattern itself, for those who ask for it. ``[batch head q_pos k_pos]``."""

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _WholePattern(shape)


class _WholePattern(PatternAccumulator):
    def __init__(self, shape: PatternShape) -> None:
        size = (shape.batch, shape.n_heads, shape.n_q, shape.n_k)
        self.whole = torch.zeros(size, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        self.whole[block.batches, block.heads, block.rows, block.columns] = block.pattern

    def finish(self) -> Float[Tensor, "batch head q_pos k_pos"]:
        return self.whole


def _real_rows(x: Float[Tensor, "batch head q_block"], block: PatternBlock) -> Tensor:
    """Rows of padding set to 0."""
    return x if block.row_valid is None else x * block.row_valid[:, None]
