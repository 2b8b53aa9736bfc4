"""What every executor does and says.

An executor runs cells in any order on whatever it has; the store is the only coordinator. It tells
what happens as events, and it stops within two seconds of an exception in ``emit``, or of Ctrl-C.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from workbench.execute.cell import Cell, Outcome
from workbench.execute.estimate import Room


@dataclass(frozen=True)
class Started:
    """A worker took up a cell."""

    cell: str
    worker: str
    """A process id, an actor or a job, as its executor names it."""
    host: str = ""


@dataclass(frozen=True)
class Advanced:
    """A cell tells how far it is."""

    cell: str
    done: int
    total: int


@dataclass(frozen=True)
class Lost:
    """A worker died; its cell is tried again, once."""

    cell: str
    worker: str
    why: str


Event = Started | Advanced | Lost | Outcome
Emit = Callable[[Event], None]


@runtime_checkable
class Executor(Protocol):
    """Runs cells somewhere."""

    name: str
    n_workers: int
    """Cells at once, at most."""

    def room(self, cells: Sequence[Cell]) -> Room | None:
        """What workers have for cells; None where that cannot be told from here.

        Raises:
            ConfigError: There is nothing at all, as a device that is not there.
        """
        ...

    def execute(self, cells: Sequence[Cell], store: Path, emit: Emit) -> None:
        """Run every cell; each ends with one ``Outcome``.

        Args:
            cells: What to run.
            store: The store's folder, which every worker must reach.
            emit: Given every event, in the calling thread.
        """
        ...


def event_document(event: Event) -> dict[str, Any]:
    """An event as JSON data: ``event`` says which, then its fields."""
    kind = "finished" if isinstance(event, Outcome) else type(event).__name__.lower()
    return {"event": kind, **asdict(event)}
