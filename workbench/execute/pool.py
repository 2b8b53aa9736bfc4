"""Keeps workers busy, whatever they are; the death of one costs one cell, which is tried again."""

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from workbench.errors import EngineError
from workbench.execute.cell import Cell, Outcome
from workbench.execute.protocol import Advanced, Emit, Lost, Started
from workbench.execute.schedule import Schedule

LOOK_SECONDS = 0.2
"""How long a look for news may take; Ctrl-C waits no longer."""
STILLBORN = 3
"""So many workers in a row that never got ready, and something is wrong with all of them."""


@runtime_checkable
class Worker(Protocol):
    """Something that runs one cell at a time."""

    name: str
    host: str

    def send(self, cell: Cell) -> None:
        """Hand it a cell; it answers with ``finished``, or dies."""
        ...


@runtime_checkable
class Crew(Protocol):
    """Where workers come from and how they are heard."""

    def hire(self) -> Worker:
        """A new worker."""
        ...

    def news(self, timeout: float) -> list[tuple[Worker, dict[str, Any]]]:
        """Messages: ``ready``, ``advanced``, ``finished`` (fields of ``Outcome``), ``died`` (why)."""
        ...

    def dismiss(self, worker: Worker) -> None:
        """A worker is not needed any more."""
        ...

    def close(self) -> None:
        """Stop every worker, within a second or two."""
        ...


class Pool:
    """Runs cells on at most ``n_workers`` workers of a crew."""

    def __init__(self, crew: Crew, n_workers: int, emit: Emit) -> None:
        self._crew, self._n_workers, self._emit = crew, n_workers, emit
        self._idle: list[Worker] = []
        self._busy: dict[str, tuple[Worker, Cell]] = {}
        self._stillborn = 0
        self._ready: set[str] = set()

    def run(self, cells: Sequence[Cell]) -> None:
        """Run every cell.

        Raises:
            EngineError: No worker can start.
        """
        self._schedule = Schedule(cells)
        try:
            while len(self._schedule) or self._busy:
                self._assign()
                start = time.monotonic()
                news = self._crew.news(LOOK_SECONDS)
                for worker, message in news:
                    self._hear(worker, message)
                if not news and time.monotonic() - start < LOOK_SECONDS / 2:
                    time.sleep(LOOK_SECONDS / 2)
        finally:
            self._crew.close()

    def _assign(self) -> None:
        for worker in list(self._idle):
            cell = self._schedule.take(worker.name)
            self._idle.remove(worker)
            if cell is None:
                # Its memory is better used by those that work.
                self._schedule.forget(worker.name)
                self._crew.dismiss(worker)
            else:
                self._give(worker, cell)
        while len(self._busy) < self._n_workers:
            cell = self._schedule.take("somebody new")
            self._schedule.forget("somebody new")
            if cell is None:
                break
            worker = self._crew.hire()
            self._schedule.hold(worker.name, cell)
            self._give(worker, cell)

    def _give(self, worker: Worker, cell: Cell) -> None:
        self._busy[worker.name] = worker, cell
        worker.send(cell)
        if worker.name in self._ready:
            self._emit(Started(cell.key, worker.name, worker.host))

    def _hear(self, worker: Worker, message: dict[str, Any]) -> None:
        kind = message.pop("event")
        if worker.name not in self._busy:
            return  # last words of a worker that was dismissed
        if kind == "ready":
            self._stillborn = 0
            self._ready.add(worker.name)
            # Only now: a worker that waits for a place on a cluster has taken up nothing.
            _, cell = self._busy[worker.name]
            self._emit(Started(cell.key, worker.name, worker.host))
        elif kind == "advanced":
            self._emit(Advanced(**message))
        elif kind == "finished":
            outcome = Outcome(**message)
            del self._busy[worker.name]
            self._idle.append(worker)
            self._schedule.note(outcome)
            self._emit(outcome)
        else:
            self._mourn(worker, message["why"])

    def _mourn(self, worker: Worker, why: str) -> None:
        _, cell = self._busy.pop(worker.name)
        self._schedule.forget(worker.name)
        if worker.name not in self._ready:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                raise EngineError(f"workers must start; {STILLBORN} in a row did not: {why}")
        if self._schedule.retry(cell):
            self._emit(Lost(cell.key, worker.name, why))
        else:
            error = f"its worker died twice, the last time: {why}; it may need more memory"
            self._emit(Outcome(cell.key, "failed", error=error))
