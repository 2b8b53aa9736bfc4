"""The longest target that succeeds in half of the cases: doubling, then bisection."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_bench import Cell
from probes.activation_attacks_scaling import HALF

Evaluate = Callable[[list[tuple[Cell, int]]], dict[tuple[Cell, int], Tensor]]
"""From attackers and target lengths to the share of tokens that each seed forced ``[seed]``."""


@dataclass
class Search:
    """Bracketing and bisection of one attacker's longest target."""

    limit: int
    resolution: float
    """It ends when the bracket is this share of its lower end, or one token."""
    low: int = 0
    """The longest that succeeded."""
    high: int | None = None
    """The shortest that failed."""

    def ask(self) -> int | None:
        """The next target length to try; None: the search is over."""
        if self.high is None:
            return None if self.low == self.limit else min(max(1, 2 * self.low), self.limit)
        if self.high - self.low <= max(1, int(self.resolution * self.low)):
            return None
        return (self.low + self.high) // 2

    def tell(self, t: int, success: float) -> None:
        """Whether at least half of the cases of length ``t`` succeeded."""
        if success >= HALF:
            self.low = t
        else:
            self.high = t

    def left(self) -> int:
        """Lengths that are still to be tried, about."""
        if self.ask() is None:
            return 0
        if self.high is None:
            return 2 + math.ceil(math.log2(max(2, 2 * self.low)))
        return max(
            1, math.ceil(math.log2((self.high - self.low) / max(1, self.low * self.resolution)))
        )


class Curves(NamedTuple):
    """Shares of forced tokens by attacker, target length and seed; NaN: not measured."""

    curve_t: Int[Tensor, " t"]
    accuracy: Float[Tensor, "cell t seed"]


def success_of(accuracy: Float[Tensor, "*size"], definition: str) -> Float[Tensor, "*size"]:
    """Success per token, or 1 where all tokens are forced; NaN stays."""
    if definition == "per-token":
        return accuracy
    return torch.where(accuracy.isnan(), accuracy, (accuracy == 1.0).float())


def find_limits(
    cells: Sequence[Cell],
    search: Search,
    evaluate: Evaluate,
    definition: str,
    report: Callable[[int, int], None],
) -> Curves:
    """Search all attackers' longest targets; each round tries one length of each.

    Args:
        cells: The attackers.
        search: Limit and resolution of every search.
        evaluate: Tries all of a round at once.
        definition: ``per-token`` or ``all-correct``.
        report: Told (tries done, tries expected) before every round.
    """
    searches = {cell: Search(search.limit, search.resolution) for cell in cells}
    found: dict[tuple[Cell, int], Tensor] = {}
    while True:
        asked = [(cell, t) for cell, each in searches.items() if (t := each.ask()) is not None]
        report(len(found), len(found) + sum(each.left() for each in searches.values()))
        if not asked:
            return _curves(cells, found)
        for (cell, t), accuracy in evaluate(asked).items():
            found[cell, t] = accuracy
            searches[cell].tell(t, float(success_of(accuracy, definition).mean()))


def _curves(cells: Sequence[Cell], found: dict[tuple[Cell, int], Tensor]) -> Curves:
    lengths = sorted({t for _, t in found})
    n_seeds = len(next(iter(found.values())))
    accuracy = torch.full((len(cells), len(lengths), n_seeds), torch.nan)
    for (cell, t), values in found.items():
        accuracy[cells.index(cell), lengths.index(t)] = values
    return Curves(torch.tensor(lengths), accuracy)
