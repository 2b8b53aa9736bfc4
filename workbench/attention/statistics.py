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
        return mean_of_columns(self.total, self.shape)


def mean_of_columns(
    total: Float[Tensor, "batch head k_pos"], shape: PatternShape
) -> Float[Tensor, "batch head k_pos"]:
    """What ``ColumnMean`` makes of the sum over each column's real rows."""
    if shape.row_valid is None:
        # Queries at or after key k; with a KV cache the first queries are not in this call.
        after = torch.arange(shape.n_k, 0, -1, device=shape.device).clamp(max=shape.n_q)
        return total / after
    after = shape.row_valid.flip(-1).cumsum(-1).flip(-1)
    return total / after.clamp(min=1.0)[:, None]


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


def sink_logit_gap(
    scores: Float[Tensor, "batch head pos pos"],
) -> Float[Tensor, "batch head pos"]:
    """The gap of ``SinkLogitGap`` by its definition, from scores that are at hand whole.

    It holds for any kernel, also where the pattern is no softmax of the scores.
    """
    n_pos = scores.shape[-1]
    between = torch.ones(n_pos, n_pos, dtype=torch.bool, device=scores.device).tril(-1)
    between[:, 0] = False
    between = between & (scores > -torch.inf)
    others = scores.masked_fill(~between, 0.0).sum(dim=-1) / between.sum(dim=-1)
    return scores[..., 0] - others


@dataclass(frozen=True)
class SinkLogitGap(PatternStatistic):
    """How far the first key's score lies above the others': S[n, 0] - mean of S[n, 1 ... n-1].

    ``[batch head q_pos]``, in nats; a query's own score (key n) is left out, so queries 0 and 1, and
    padding, have no gap: NaN. Softmax takes one constant from a row's scores, so the gap is that of
    log P. Keys that a query does not see, or whose weight is below the smallest float (1e-38), are
    left out of the mean; where the first key is such, there is no gap. Card: active_dormant
    section 3.
    """

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _SinkLogitGap(shape)


class _SinkLogitGap(PatternAccumulator):
    def __init__(self, shape: PatternShape) -> None:
        size = (shape.batch, shape.n_heads, shape.n_q)
        self.gap = torch.full(size, torch.nan, device=shape.device)
        self.offset = shape.n_k - shape.n_q

    def update(self, block: PatternBlock) -> None:
        pattern = block.pattern
        n_rows, n_keys = pattern.shape[-2:]
        query = (
            torch.arange(n_rows, device=pattern.device)[:, None] + block.rows.start + self.offset
        )
        key = torch.arange(n_keys, device=pattern.device)
        seen = pattern >= torch.finfo(pattern.dtype).tiny
        between = seen & (key > 0) & (key < query)
        log = torch.where(seen, pattern, 1.0).log()
        # 0 / 0 = NaN where there is nothing to compare with.
        others = (log * between).sum(dim=-1) / between.sum(dim=-1)
        gap = torch.where(seen[..., 0], log[..., 0] - others, torch.nan)
        if block.row_valid is not None:
            gap = gap.masked_fill(block.row_valid[:, None] == 0, torch.nan)
        self.gap[block.batches, block.heads, block.rows] = gap

    def finish(self) -> Float[Tensor, "batch head q_pos"]:
        return self.gap


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
