"""Candidates that share their first tokens: those are run once, and the rest goes on from there.

Going on after a prefix needs the residual stream at the entry of block 0. In nearly every model that
is a multiple of the token's row of W_E plus something of the position, which one small forward pass
finds and proves; where it is not so, whole rows are run: the same numbers for more time.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.models.base import ModelAdapter, Site
from workbench.models.prefix import Prefix, continue_after, prefix_of

LEAST_SAVED = 64
"""Tokens that a shared prefix must save in a forward pass before it is worth its own."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What tokens look like at the entry of block 0: ``scale * W_E[token] + place[pos]``."""

    table: Float[Tensor, "d_vocab d_model"]
    """W_E itself: scaled, it would be a second copy of what may be the largest matrix."""
    scale: float
    place: Float[Tensor, "pos d_model"]

    def __call__(self, rows: Int[Tensor, "n rest"], first: int) -> Float[Tensor, "n rest d_model"]:
        """The residual stream of tokens that begin at position ``first``."""
        return self.scale * self.table[rows] + self.place[first : first + rows.shape[1]]


def find_entry(model: ModelAdapter, n_pos: int) -> Entry | None:
    """Find scale and positions from one row of random tokens, and prove them on another.

    Args:
        model: Unedited.
        n_pos: Positions that are needed.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.spec.d_vocab, (3, n_pos), generator=generator)
    site = Site("resid_pre", 0)
    found: Tensor = model.capture(tokens, [site])[site]
    table = model.weight("W_E")
    if table.shape[1] != found.shape[2]:
        return None
    change, rows = found[1] - found[0], table[tokens[1]] - table[tokens[0]]
    scale = float((change * rows).sum() / (rows * rows).sum().clamp_min(1e-30))
    entry = Entry(table, scale, found[0] - scale * table[tokens[0]])
    kind = getattr(torch, model.dtype, torch.float32)
    error = (entry(tokens[2:], 0).to(kind).float() - found[2:]).abs().max()
    return entry if float(error) <= 1e-5 * float(found.abs().max()) else None


class SharedPrefix:
    """Last-position logits of rows, their common first tokens run once where that pays.

    What the last logits do not need is left out (``continue_from(..., last=1)``).
    """

    def __init__(self, model: ModelAdapter) -> None:
        self._model = model
        self._entry: Entry | None = None
        self._n_pos = 0
        self._tokens: tuple[int, ...] = ()
        self._prefix: Prefix | None = None
        self._usable = getattr(model, "prefix", None) is not None and not model.interventions

    def last_logits(self, rows: Int[Tensor, "n pos"]) -> Float[Tensor, "n d_vocab"]:
        """The logits of each row's last position."""
        entry = self._entry_of(rows.shape[1])
        if entry is None:
            return self._model.logits(rows, last=1)[:, -1]
        first, prefix = self._begin(rows)
        with torch.no_grad():
            return continue_after(self._model, 0, entry(rows[:, first:], first), prefix, 1)[:, -1]

    def _entry_of(self, n_pos: int) -> Entry | None:
        """What tokens look like at block 0; None where that is not known or of no use."""
        if self._usable and self._n_pos < n_pos:
            self._n_pos = n_pos
            self._entry = find_entry(self._model, n_pos)
            self._usable = self._entry is not None
        return self._entry if self._usable else None

    def _begin(self, rows: Int[Tensor, "n pos"]) -> tuple[int, Prefix | None]:
        """The first position to run, and what stands before it."""
        differ = (rows != rows[0]).any(dim=0)
        # The last token is always run: its logits are wanted.
        n_shared = int(differ.int().argmax()) if bool(differ.any()) else rows.shape[1] - 1
        if n_shared * (len(rows) - 1) < LEAST_SAVED:
            return 0, None
        prefix = self._prefix_of(rows[:1, :n_shared])
        if prefix is None:
            return 0, None
        return n_shared, prefix.select(torch.zeros(len(rows), dtype=torch.long))

    def _prefix_of(self, tokens: Int[Tensor, "1 pos"]) -> Prefix | None:
        key = tuple(tokens[0].tolist())
        if key != self._tokens:
            self._tokens, self._prefix = key, prefix_of(self._model, tokens)
        return self._prefix
