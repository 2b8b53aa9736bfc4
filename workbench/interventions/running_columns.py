"""Column sums of a pattern that go on over the calls of one generation: ACT's memory."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import TiledCall
from workbench.attention.streaming import PatternBlock

SPARE_COLUMNS = 128
"""How many keys more than it needs a running sum has room for when it is made."""


@dataclass(frozen=True)
class Place:
    """Where the rows and columns of a tile stand in their prompts."""

    call: TiledCall
    block: PatternBlock

    @property
    def rows(self) -> Int[Tensor, "q_pos one"]:
        """Positions of the queries."""
        block = self.block
        rows = torch.arange(block.pattern.shape[-2], device=block.pattern.device)
        return (rows + self.call.n_before + block.rows.start)[:, None]

    @property
    def keys(self) -> Int[Tensor, " k_pos"]:
        """Positions of the keys; learned ones stand below 0."""
        block = self.block
        keys = torch.arange(block.pattern.shape[-1], device=block.pattern.device)
        return keys + block.columns.start + self.call.first_column

    @property
    def first(self) -> Int[Tensor, "batch one one2 one3"]:
        """Position of each prompt's first token."""
        first = self.call.first_key[self.block.batches].to(self.block.pattern.device)
        return first[:, None, None, None] + self.call.first_column


class RunningColumns:
    """Column sums of one layer's pattern, over the calls of one generation."""

    def __init__(self) -> None:
        self._total: Float[Tensor, "batch head k_pos"] | None = None
        self._first_column = 0

    @property
    def total(self) -> Float[Tensor, "batch head k_pos"]:
        """Attention that each key has received."""
        assert self._total is not None  # at least one tile has come
        return self._total

    def open(self, call: TiledCall) -> None:
        """Take notice of a new call: keys that have left the cache leave the sums."""
        if call.n_before > 0:
            self._let_go(call.first_column)
        self._first_column = call.first_column

    def _let_go(self, first_column: int) -> None:
        gone = first_column - self._first_column
        if self._total is not None and gone > 0:
            self._total = self._total[..., gone:]
        self._first_column = first_column

    def follow(
        self, row: Float[Tensor, "batch head one k_pos"], first_column: int
    ) -> Float[Tensor, "batch head one k_pos"]:
        """Add a decoded token's row; returns what each key has received up to it."""
        assert self._total is not None  # the prompt has come before
        self._let_go(first_column)
        total = self._room_for(row.shape[-1])[..., : row.shape[-1]]
        return total.add_(row[:, :, 0])[:, :, None]

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Beam search has put other rows in each one's place: take theirs over."""
        if self._total is not None:
            self._total = self._total.index_select(0, rows.to(self._total.device))

    def advance(
        self, place: Place, part: Float[Tensor, "batch head q_pos k_pos"]
    ) -> Float[Tensor, "batch head q_pos k_pos"]:
        """Add a tile's rows; returns what each key has received up to each row."""
        block, total = place.block, self._room(place, part)
        running = self.received(total[block.batches, :, block.columns], part, block)
        total[block.batches, :, block.columns] = running[..., -1, :]
        return running

    def add(
        self, place: Place, part: Float[Tensor, "batch head q_pos k_pos"]
    ) -> tuple[Float[Tensor, "batch head k_pos"], Float[Tensor, "batch head k_pos"]]:
        """Add a tile's rows; returns what each of its keys had received before it, and has after."""
        block, total = place.block, self._room(place, part)
        before = total[block.batches, :, block.columns].clone()
        after = before + _real_rows(part, block).sum(dim=-2)
        total[block.batches, :, block.columns] = after
        return before, after

    @staticmethod
    def received(
        before: Float[Tensor, "batch head n"],
        part: Float[Tensor, "batch head q_pos n"],
        block: PatternBlock,
    ) -> Float[Tensor, "batch head q_pos n"]:
        """What some of a tile's keys have received up to each of its rows."""
        return before[..., None, :] + _real_rows(part, block).cumsum(dim=-2)

    def _room(self, place: Place, part: Tensor) -> Float[Tensor, "batch head k_pos"]:
        """The sums, with room for the tile's columns, at 0 where a new prompt begins."""
        total, block = self._grown(place, part), place.block
        if block.rows.start == 0 and place.call.n_before <= 0:
            total[block.batches] = 0.0
        return total

    def _grown(self, place: Place, part: Tensor) -> Float[Tensor, "batch head k_pos"]:
        """The sums, with room for the tile's columns."""
        batch, stop = place.call.first_key.shape[0], place.block.columns.stop
        if self._total is None or (place.call.n_before <= 0 and self._total.shape[0] != batch):
            self._total = part.new_zeros(batch, part.shape[1], stop + SPARE_COLUMNS)
        return self._room_for(stop)

    def _room_for(self, stop: int) -> Float[Tensor, "batch head k_pos"]:
        assert self._total is not None  # made before
        missing = stop - self._total.shape[-1]
        if missing > 0:
            # With every token comes a key: room is made for many at once.
            self._total = torch.nn.functional.pad(self._total, (0, missing + SPARE_COLUMNS))
        return self._total


def _real_rows(part: Tensor, block: PatternBlock) -> Float[Tensor, "batch head q_pos k_pos"]:
    """Rows of padding set to 0."""
    return part if block.row_valid is None else part * block.row_valid[:, None, :, None]
