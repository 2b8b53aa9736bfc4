"""Attention and statistics of its pattern, tile by tile.

For queries Q and keys K the pattern is P = softmax(scaling * Q K^T + mask). One tile of it (some
prompts, some heads, a block of query rows) at a time is made, read by every statistic, mixed into
the output and forgotten: memory is O(block x T) instead of O(heads x T^2), and one softmax serves
output and statistics alike.

Card: attention_sink section 6, identity 7.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.attention.scores import capped, masked, shows, softmax, wide, wide_dtype

TILE_FLOATS = 1 << 20
"""Numbers in one tile of the pattern (4 MiB). With 128 rows a tile, this was fastest on a CPU from T = 256
to 4096; see docs/log.md."""
TILE_ROWS = 128
"""Query rows in one tile: fewer make the matrix products slow."""
MIN_TILE_ROWS = 16
CUDA_TILE = 1 << 25, 1024
"""Numbers and rows of a tile on CUDA: reasoned, not measured. Every tile is about ten launches, and 32 heads of
8,192 queries and keys are 64 tiles so, 2,048 of those for a CPU's cache; a tile takes 128 MiB."""

_given: tuple[int, int] | None = None


@contextmanager
def tile_budget(n_floats: int, n_rows: int) -> Iterator[None]:
    """Inside, a tile has at most so many numbers, if it can be helped, and rows, on every device."""
    global _given
    before = _given
    _given = n_floats, n_rows
    try:
        yield
    finally:
        _given = before


def small_tiles(n_rows: int) -> AbstractContextManager[None]:
    """Inside, a tile is one prompt, the query heads of one key-value head and so many rows.

    No number may depend on where a pattern is cut; ``workbench validate`` and tests look.
    """
    return tile_budget(1, n_rows)


def _budget(device: torch.device) -> tuple[int, int]:
    """Numbers and rows of a tile on a device."""
    return _given or (CUDA_TILE if device.type == "cuda" else (TILE_FLOATS, TILE_ROWS))


@dataclass(frozen=True)
class PatternBlock:
    """A tile of the pattern: some prompts, some heads, some rows, and the columns they can see."""

    pattern: Float[Tensor, "tile_batch tile_head q_block k_span"]
    """After softmax. A row that sees nothing (left padding) is zero; columns past the tile's end
    are zero too and left out."""
    batches: slice
    heads: slice
    rows: slice
    columns: slice
    row_valid: Float[Tensor, "tile_batch q_block"] | None
    """1 for rows of real tokens, 0 for padding; None: all real."""
    outside: Float[Tensor, "tile_batch tile_head q_block"] | None = None
    """What each row gives to a learned sink that is no key; None: there is none."""


@dataclass(frozen=True)
class PatternShape:
    """The sizes a statistic may need before the first tile comes."""

    batch: int
    n_heads: int
    n_q: int
    n_k: int
    device: torch.device
    row_valid: Float[Tensor, "batch q_pos"] | None = None


class PatternAccumulator(ABC):
    """Collects one statistic over the tiles of one layer."""

    @abstractmethod
    def update(self, block: PatternBlock) -> None:
        """Read one tile; every (prompt, head, row) comes exactly once."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Return the statistic."""


class PatternStatistic(ABC):
    """A quantity of the pattern that can be collected tile by tile."""

    @abstractmethod
    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""


Change = Callable[[PatternBlock], PatternBlock]


@dataclass(frozen=True)
class Attended:
    """What one pass over a layer's tiles gave."""

    output: Float[Tensor, "batch q_pos head d_value"] | None
    """None when it was not asked for."""
    log_sum: Float[Tensor, "batch head q_pos"] | None
    """Log of every row's softmax normaliser (infinite for a row that sees nothing); None when it
    was not asked for."""
    statistics: dict[str, Tensor]


def attend(
    inputs: AttentionInputs,
    statistics: Mapping[str, PatternStatistic],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
    *,
    want: tuple[str, ...] = ("output",),
    change: Change | None = None,
) -> Attended:
    """Compute attention and statistics of its pattern in one tiled pass, in float32 (or float64: ``wide``).

    Args:
        inputs: Queries, keys, values, mask and scaling of one layer.
        statistics: What to collect, by name; may be empty.
        row_valid: 1 for queries that are real tokens, 0 for padding; None: all real.
        want: What else to return: any of "output" (in the queries' dtype) and "log_sum".
        change: Applied to every tile before anything reads it; its tiles hold all heads.
    """
    batch, n_heads, n_q, _ = inputs.query.shape
    shape = PatternShape(batch, n_heads, n_q, inputs.key.shape[2], inputs.query.device, row_valid)
    collecting = {name: statistic.start(shape) for name, statistic in statistics.items()}
    source = _Source.of(inputs)
    output = log_sum = None
    if "output" in want:
        output = inputs.query.new_empty(batch, n_q, n_heads, inputs.value.shape[-1])
    if "log_sum" in want:
        log_sum = inputs.query.new_empty(batch, n_heads, n_q, dtype=wide_dtype(inputs.query))
    for tile in _tiles(inputs, whole_heads=change is not None):
        block = source.block(tile, row_valid, log_sum)
        if change is not None:
            block = change(block)
        if output is not None:
            mixed = source.mix(block, tile)
            output[tile.batches, tile.rows, block.heads] = mixed.transpose(1, 2).to(output.dtype)
        for accumulator in collecting.values():
            accumulator.update(block)
    found = {name: accumulator.finish() for name, accumulator in collecting.items()}
    return Attended(output, log_sum, found)


def attention_scores(inputs: AttentionInputs) -> Float[Tensor, "batch head q_pos k_pos"]:
    """All scaled, capped and masked scores before softmax, ``wide``; hidden entries -inf."""
    source, n_k = _Source.of(inputs), inputs.key.shape[2]
    shape, dtype = (*inputs.query.shape[:3], n_k), wide_dtype(inputs.query)
    whole = inputs.query.new_full(shape, -torch.inf, dtype=dtype)
    for tile in _tiles(inputs, whole_heads=False):
        heads = source.heads(tile)
        whole[tile.batches, heads, tile.rows, tile.columns] = source.scores(tile)
    return whole


@dataclass(frozen=True)
class _Tile:
    """A part of one layer's pattern; several prompts only with all their heads."""

    batches: slice
    kv_heads: slice
    rows: slice
    columns: slice


def _tiles(inputs: AttentionInputs, *, whole_heads: bool) -> Iterator[_Tile]:
    """Cut a layer's pattern so that no tile exceeds its budget, if it can be helped."""
    batch, n_kv, n_q = inputs.query.shape[0], inputs.key.shape[1], inputs.query.shape[2]
    per_row = inputs.n_groups * inputs.key.shape[2]
    n_floats, n_rows = _budget(inputs.query.device)
    n_rows = min(n_q, n_rows)
    at_once = max(n_floats // (per_row * n_rows), n_kv if whole_heads else 1)
    if at_once * per_row * n_rows > n_floats:
        n_rows = min(n_rows, max(n_floats // (at_once * per_row), MIN_TILE_ROWS))
    n_prompts, n_heads = max(at_once // n_kv, 1), min(at_once, n_kv)
    for prompt in range(0, batch, n_prompts):
        for head in range(0, n_kv, n_heads):
            for row in range(0, n_q, n_rows):
                stop = min(row + n_rows, n_q)
                seen = inputs.offset + stop if inputs.causal else inputs.key.shape[2]
                yield _Tile(
                    slice(prompt, min(prompt + n_prompts, batch)),
                    slice(head, min(head + n_heads, n_kv)),
                    slice(row, stop),
                    slice(0, min(seen, inputs.key.shape[2])),
                )


@dataclass(frozen=True)
class _Source:
    """A layer's inputs in the layout that the tiles are cut from."""

    inputs: AttentionInputs
    key: Float[Tensor, "batch kv_head d_head k_pos"]
    value: Float[Tensor, "batch kv_head k_pos d_value"]

    @staticmethod
    def of(inputs: AttentionInputs) -> "_Source":
        key, value = wide(inputs.key), wide(inputs.value)
        if inputs.query.shape[0] > 1:
            # A product over prompts and heads at once would copy a strided key for every tile.
            key, value = key.contiguous(), value.contiguous()
        return _Source(inputs, key.transpose(-1, -2), value)

    def heads(self, tile: _Tile) -> slice:
        """The query heads of a tile."""
        groups = self.inputs.n_groups
        return slice(tile.kv_heads.start * groups, tile.kv_heads.stop * groups)

    def scores(self, tile: _Tile) -> Float[Tensor, "tile_batch tile_head q_block k_span"]:
        """Scaled, capped and masked scores of a tile; hidden entries are -inf."""
        inputs = self.inputs
        query = wide(inputs.query[tile.batches, self.heads(tile), tile.rows]) * inputs.scaling
        n_prompts, n_heads, n_rows, d_head = query.shape
        # Query heads of one group are stacked as rows: keys are never repeated.
        query = query.reshape(n_prompts, n_heads // inputs.n_groups, -1, d_head)
        scores = torch.matmul(query, self.key[tile.batches, tile.kv_heads, :, tile.columns])
        scores = scores.view(n_prompts, n_heads, n_rows, -1)
        scores = capped(scores, inputs.softcap)
        if inputs.mask is not None:
            return masked(scores, self._mask(tile))
        if inputs.causal:
            # Only the last columns hold keys that some row of the tile must not see.
            hidden = torch.ones(n_rows, n_rows, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., inputs.offset + tile.rows.start :].masked_fill_(hidden, -torch.inf)
        return scores

    def _mask(self, tile: _Tile) -> Tensor:
        mask = self.inputs.mask
        assert mask is not None
        batches = tile.batches if mask.shape[0] > 1 else slice(None)
        heads = self.heads(tile) if mask.shape[1] > 1 else slice(None)
        return mask[batches, heads, tile.rows, tile.columns]

    def block(self, tile: _Tile, row_valid: Tensor | None, log_sum: Tensor | None) -> PatternBlock:
        """The tile's rows after softmax; also notes their normalisers where asked."""
        scores = self.scores(tile)
        heads = self.heads(tile)
        if self.inputs.sinks is not None:
            sink = self.inputs.sinks.to(scores)[heads, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        top = None if log_sum is None else scores.amax(dim=-1)
        pattern = softmax(scores)
        if log_sum is not None and top is not None:
            # p_max = exp(s_max - log_sum): what softmax divided by, without another exp.
            log_sum[tile.batches, heads, tile.rows] = top - pattern.amax(dim=-1).log()
        outside = None
        if self.inputs.sinks is not None:
            pattern, outside = pattern[..., :-1], pattern[..., -1]
        empty = self._empty(tile)
        if empty is not None:
            pattern = pattern.masked_fill(empty[..., None], 0.0)
            if log_sum is not None:
                rows = log_sum[tile.batches, heads, tile.rows]
                log_sum[tile.batches, heads, tile.rows] = rows.masked_fill(empty, torch.inf)
        valid = None if row_valid is None else row_valid[tile.batches, tile.rows]
        return PatternBlock(pattern, tile.batches, heads, tile.rows, tile.columns, valid, outside)

    def _empty(self, tile: _Tile) -> Bool[Tensor, "#tile_batch #tile_head q_block"] | None:
        """Rows that see no key, which softmax makes NaN (or all sink); None: there are none."""
        if self.inputs.mask is None:
            return None
        empty = ~shows(self._mask(tile)).any(dim=-1)
        return empty if bool(empty.any()) else None

    def mix(
        self, block: PatternBlock, tile: _Tile
    ) -> Float[Tensor, "tile_batch tile_head q_block d_value"]:
        """Weighted sum of the values for a tile."""
        n_prompts, n_heads, n_rows, span = block.pattern.shape
        pattern = block.pattern.reshape(n_prompts, n_heads // self.inputs.n_groups, -1, span)
        mixed = torch.matmul(pattern, self.value[tile.batches, tile.kv_heads, tile.columns])
        return mixed.view(n_prompts, n_heads, n_rows, -1)
