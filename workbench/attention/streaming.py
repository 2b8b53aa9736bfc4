"""Attention and statistics of its pattern, block of queries by block of queries.

For queries Q and keys K the pattern is P = softmax(scaling * Q K^T + mask). One block of query
rows at a time is made, read by every statistic, mixed into the output and forgotten: memory is
O(block x T) instead of O(heads x T^2), and one softmax serves output and statistics alike.

With unnormalised weights E = exp(S - rowmax) and row sums Z (plus the learned sink's share,
where a model has one), P = E / Z. Column sums need no P: sum_q P[q, k] = (1 / Z)^T E.

Card: attention_sink section 6, identity 7.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK_FLOATS = 1 << 19
"""Numbers in one block of scores (2 MiB of float32): measured best where a block fits a core's
second-level cache, see docs/log.md."""


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is computed from, as transformers hands it over."""

    query: Float[Tensor, "batch head q_pos d_head"]
    key: Float[Tensor, "batch kv_head k_pos d_head"]
    value: Float[Tensor, "batch kv_head k_pos d_value"]
    mask: Tensor | None
    """``[batch or 1, 1 or head, q_pos, k_pos]``: bool (True: visible) or added to the scores.
    None: causal, the last query at the last key."""
    scaling: float
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2)."""
    sinks: Float[Tensor, " head"] | None = None
    """Learned logits of a key that holds nothing (GPT-OSS); takes its share of every row."""
    causal: bool = True
    """With no mask: whether a query sees only keys up to its own position."""

    @property
    def n_groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query among the keys (more than 0 with a KV cache)."""
        return self.key.shape[2] - self.query.shape[2]

    def visible(self) -> Bool[Tensor, "#batch #head q_pos k_pos"]:
        """Which keys each query may see, whole: for references and small inputs."""
        n_q, n_k = self.query.shape[2], self.key.shape[2]
        if self.mask is not None:
            seen = self.mask if self.mask.dtype == torch.bool else self.mask > _hidden(self.mask)
            return seen[..., :n_k]
        if not self.causal:
            return torch.ones(1, 1, n_q, n_k, dtype=torch.bool, device=self.query.device)
        rows = torch.arange(n_q, device=self.query.device)[:, None] + self.offset
        return (torch.arange(n_k, device=self.query.device) <= rows)[None, None]


def _hidden(mask: Tensor) -> float:
    """Half of the dtype's minimum: what transformers adds to hide a key is below it."""
    return torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class PatternBlock:
    """Some rows of the pattern, all heads; columns outside ``k_start ...`` are zero."""

    weights: Float[Tensor, "batch head q_block k_span"]
    """Unnormalised: divide by ``row_sum`` for the pattern."""
    row_sum: Float[Tensor, "batch head q_block"]
    """At least 1 for a row that sees anything; infinite for a row that sees nothing."""
    q_start: int
    k_start: int
    row_valid: Float[Tensor, "batch q_block"] | None
    """1 for rows of real tokens, 0 for padding; None: all real."""

    @property
    def rows(self) -> slice:
        """The queries in this block."""
        return slice(self.q_start, self.q_start + self.weights.shape[2])

    @property
    def columns(self) -> slice:
        """The keys in this block."""
        return slice(self.k_start, self.k_start + self.weights.shape[3])

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head q_block k_span"]:
        """The normalised rows; made only when a statistic needs them."""
        return self.weights / self.row_sum[..., None]

    @cached_property
    def row_weight(self) -> Float[Tensor, "batch head q_block"]:
        """What turns weights into the pattern: 1 / row_sum, 0 for rows of padding."""
        scale = 1.0 / self.row_sum
        return scale if self.row_valid is None else scale * self.row_valid[:, None]


@dataclass(frozen=True)
class PatternShape:
    """The sizes a statistic may need before the first block comes."""

    batch: int
    n_heads: int
    n_q: int
    n_k: int
    device: torch.device
    row_valid: Float[Tensor, "batch q_pos"] | None = None


class PatternAccumulator(ABC):
    """Collects one statistic over the blocks of one layer."""

    @abstractmethod
    def update(self, block: PatternBlock) -> None:
        """Read one block of rows."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Return the statistic."""


class PatternStatistic(ABC):
    """A quantity of the pattern that can be collected row block by row block."""

    @abstractmethod
    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""


def attend(
    inputs: AttentionInputs,
    statistics: Mapping[str, PatternStatistic],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
    *,
    with_output: bool = True,
    change: "Callable[[PatternBlock], PatternBlock] | None" = None,
) -> tuple[
    Float[Tensor, "batch q_pos head d_value"] | None,
    Float[Tensor, "batch head q_pos"],
    dict[str, Tensor],
]:
    """Compute attention and statistics of its pattern in one blocked pass, in float32.

    Args:
        inputs: Queries, keys, values, mask and scaling of one layer.
        statistics: What to collect, by name; may be empty.
        row_valid: 1 for queries that are real tokens, 0 for padding; None: all real.
        with_output: Also mix the values (skip when another kernel makes the output).
        change: Applied to every block of rows before anything reads it.

    Returns:
        The output (None without ``with_output``), the log of every row's normaliser (the
        log-sum-exp of its scores), and the statistics by name.
    """
    batch, n_heads, n_q, _ = inputs.query.shape
    n_k = inputs.key.shape[2]
    shape = PatternShape(batch, n_heads, n_q, n_k, inputs.query.device, row_valid)
    collecting = {name: statistic.start(shape) for name, statistic in statistics.items()}
    value = inputs.value.float() if with_output else None
    pieces, log_sums = [], []
    for block, row_max in _blocks(inputs, row_valid):
        log_sums.append(row_max + block.row_sum.log())
        if change is not None:
            block = change(block)
        if value is not None:
            pieces.append(_mix(block, value))
        for accumulator in collecting.values():
            accumulator.update(block)
    output = torch.cat(pieces, dim=1).to(inputs.query.dtype) if pieces else None
    results = {name: accumulator.finish() for name, accumulator in collecting.items()}
    return output, torch.cat(log_sums, dim=-1), results


def attention_scores(inputs: AttentionInputs) -> Float[Tensor, "batch head q_pos k_pos"]:
    """All scaled, capped and masked scores before softmax, in float32; hidden entries -inf."""
    key = inputs.key.float().transpose(-1, -2)
    n_k = inputs.key.shape[2]
    whole = inputs.query.new_full((*inputs.query.shape[:3], n_k), -torch.inf, dtype=torch.float32)
    for start, stop in _row_ranges(inputs):
        columns = _visible_columns(inputs, start, stop)
        whole[:, :, start:stop, columns] = _scores(inputs, key, start, stop, columns)
    return whole


def _mix(
    block: PatternBlock, value: Float[Tensor, "batch kv_head k_pos d_value"]
) -> Float[Tensor, "batch q_block head d_value"]:
    """Weighted sum of the values for a block of queries."""
    batch, n_heads, n_rows, span = block.weights.shape
    n_kv = value.shape[1]
    weights = block.weights.reshape(batch, n_kv, -1, span)
    mixed = torch.matmul(weights, value[:, :, block.columns])
    mixed = mixed.reshape(batch, n_heads, n_rows, -1)
    mixed /= block.row_sum[..., None]
    return mixed.transpose(1, 2)


def _blocks(
    inputs: AttentionInputs, row_valid: Tensor | None
) -> Iterator[tuple[PatternBlock, Float[Tensor, "batch head q_block"]]]:
    """Yield the pattern's row blocks with the row maxima that were subtracted."""
    key = inputs.key.float().transpose(-1, -2)
    for start, stop in _row_ranges(inputs):
        columns = _visible_columns(inputs, start, stop)
        scores = _scores(inputs, key, start, stop, columns)
        row_max = scores.amax(dim=-1, keepdim=True)
        if inputs.sinks is not None:
            row_max = torch.maximum(row_max, inputs.sinks.float()[None, :, None, None])
        # A row that sees nothing (left padding) has maximum -inf; any finite value makes its
        # weights exactly 0, and the infinite row sum makes its output 0 instead of NaN.
        empty = row_max == -torch.inf
        row_max = row_max.masked_fill(empty, 0.0)
        weights = _exp(scores, row_max)
        row_sum = weights.sum(dim=-1)
        if inputs.sinks is not None:
            row_sum = row_sum + torch.exp(inputs.sinks.float()[None, :, None] - row_max[..., 0])
        row_sum = row_sum.masked_fill(empty[..., 0], torch.inf)
        valid = None if row_valid is None else row_valid[:, start:stop]
        yield PatternBlock(weights, row_sum, start, columns.start, valid), row_max[..., 0]


def _exp(scores: Tensor, row_max: Tensor) -> Tensor:
    if torch.is_grad_enabled() and scores.requires_grad:
        return torch.exp(scores - row_max)
    return scores.sub_(row_max).exp_()


def _row_ranges(inputs: AttentionInputs) -> Iterator[tuple[int, int]]:
    """Cut the queries so that no block of scores exceeds BLOCK_FLOATS."""
    batch, n_heads, n_q, _ = inputs.query.shape
    start = 0
    while start < n_q:
        # Causal rows see few keys at first: early blocks are tall, late ones flat.
        seen = (
            inputs.offset + start if inputs.mask is None and inputs.causal else inputs.key.shape[2]
        )
        rows = max(BLOCK_FLOATS // (batch * n_heads * max(seen, 64)), 16)
        stop = min(start + rows, n_q)
        yield start, stop
        start = stop


def _visible_columns(inputs: AttentionInputs, start: int, stop: int) -> slice:
    """The keys that any query of the block may see, as far as the causal order tells."""
    if inputs.causal:
        return slice(0, min(inputs.offset + stop, inputs.key.shape[2]))
    return slice(0, inputs.key.shape[2])


def _scores(
    inputs: AttentionInputs, key: Tensor, start: int, stop: int, columns: slice
) -> Float[Tensor, "batch head q_block k_span"]:
    """Scaled, capped and masked scores of a block; hidden entries are -inf."""
    batch, n_heads, _, d_head = inputs.query.shape
    n_kv = inputs.key.shape[1]
    query = inputs.query[:, :, start:stop].float() * inputs.scaling
    # Query heads of one group are stacked as rows: keys are never repeated.
    query = query.reshape(batch, n_kv, -1, d_head)
    scores = torch.matmul(query, key[..., columns])
    scores = scores.reshape(batch, n_heads, stop - start, -1)
    if inputs.softcap is not None:
        scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    if inputs.mask is not None:
        return _masked(scores, inputs.mask[:, :, start:stop, columns])
    if not inputs.causal:
        return scores
    # Only the last stop - start columns hold keys that some row of the block must not see.
    first = inputs.offset + start
    n_rows = stop - start
    hidden = torch.ones(n_rows, n_rows, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., first : first + n_rows].masked_fill_(hidden, -torch.inf)
    return scores


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    # transformers hides with the dtype's minimum; -inf keeps a fully hidden row recognisable.
    return (scores + mask).masked_fill(mask < _hidden(mask), -torch.inf)
