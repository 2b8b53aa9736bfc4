"""Which cell a free worker takes next: one of the model it holds, while there are any.

A model is loaded a second time, by another worker, only when its waiting cells will take longer
than the loading. Nothing here knows a process; the pool does.
"""

from collections import deque
from collections.abc import Sequence

from workbench.execute.cell import Cell, Outcome

TRIES = 2
"""A cell whose worker died is tried once more."""


class Schedule:
    """The cells that wait, by model."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._waiting: dict[str, deque[Cell]] = {}
        for cell in cells:
            self._waiting.setdefault(cell.load_key, deque()).append(cell)
        self._model_of: dict[str, str] = {cell.key: cell.load_key for cell in cells}
        self._holders: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self._n_waiting = len(cells)
        self._seconds: dict[str, tuple[int, float]] = {}  # cells that ended, and their sum
        self._load_seconds: dict[str, float] = {}

    def __len__(self) -> int:
        """Cells that wait."""
        return self._n_waiting

    def take(self, worker: str) -> Cell | None:
        """A cell for a free worker; None when it would only load what another holds."""
        model = self._choose(worker)
        if model is None:
            return None
        self._holders[worker] = model
        cell = self._waiting[model].popleft()
        self._n_waiting -= 1
        self._tries[cell.key] = self._tries.get(cell.key, 0) + 1
        return cell

    def forget(self, worker: str) -> None:
        """A worker is gone, and with it the model it held."""
        self._holders.pop(worker, None)

    def retry(self, cell: Cell) -> bool:
        """Put back a cell whose worker died; False when it had its tries."""
        if self._tries.get(cell.key, 0) >= TRIES:
            return False
        self._waiting[cell.load_key].appendleft(cell)
        self._n_waiting += 1
        return True

    def note(self, outcome: Outcome) -> None:
        """Learn how long cells and loading take."""
        model = self._model_of[outcome.cell]
        if outcome.status != "computed":
            return
        count, total = self._seconds.get(model, (0, 0.0))
        self._seconds[model] = count + 1, total + outcome.seconds - outcome.load_seconds
        if outcome.load_seconds:
            self._load_seconds[model] = outcome.load_seconds

    def _choose(self, worker: str) -> str | None:
        held = self._holders.get(worker)
        if held is not None and self._waiting[held]:
            return held
        waiting = [model for model, cells in self._waiting.items() if cells]
        taken = set(self._holders.values()) - {held}
        free = [model for model in waiting if model not in taken]
        worth = free or [model for model in waiting if self._is_worth_loading(model)]
        return max(worth, key=lambda model: len(self._waiting[model]), default=None)

    def _is_worth_loading(self, model: str) -> bool:
        """Whether a further worker that loads the model would end sooner than without it."""
        count, total = self._seconds.get(model, (0, 0.0))
        if not count or model not in self._load_seconds:
            return True  # nothing is known yet: rather work than wait
        holders = list(self._holders.values()).count(model) or 1
        left = total / count * len(self._waiting[model]) / holders
        return left > self._load_seconds[model]

    def hold(self, worker: str, cell: Cell) -> None:
        """A worker loads the model of a cell."""
        self._holders[worker] = cell.load_key
