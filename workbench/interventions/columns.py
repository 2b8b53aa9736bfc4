"""Some columns of a tile: a run of them and a few before it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of a tile, in order. To take a run is much faster than to pick columns one by one."""

    few: Int[Tensor, " few"] | None
    """Those before the run; None: there are none."""
    run: slice

    @staticmethod
    def where(chosen: Bool[Tensor, "batch head k_pos"]) -> "Columns":
        """The columns that are chosen in some prompt and head, and maybe some between them."""
        keys = chosen.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        places: list[int] = keys.tolist()
        if not places:
            return Columns(None, slice(0, 0))
        if 2 * len(places) > places[-1] - places[0]:
            return Columns(None, slice(places[0], places[-1] + 1))
        # The keys of a tile's own rows are often all chosen; of those before, few are. Some gap is
        # above 2: with none the run would have been taken above.
        start = max(index for index, gap in enumerate(_gaps(places), 1) if gap > 2)
        return Columns(keys[:start], slice(places[start], places[-1] + 1))

    def of(self, x: Tensor) -> Tensor:
        """Their entries, along the last axis."""
        if self.few is None:
            return x[..., self.run]
        return torch.cat([x[..., self.few], x[..., self.run]], dim=-1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Set their entries, along the last axis."""
        n_few = 0 if self.few is None else len(self.few)
        if self.few is not None:
            x[..., self.few] = values[..., :n_few]
        x[..., self.run] = values[..., n_few:]


EVERY = Columns(None, slice(None))


def _gaps(places: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(places)]
