"""Runs a plan on an executor and keeps what a person wants to know beside the results.

<store>/sweeps/<key of the plan>/    plan.json        the plan as written, and its cells
                                     progress.json    where it stands, replaced as it goes
                                     outcomes.jsonl   how each cell of the last run ended, one a line
                                     failures.jsonl   of those that failed, with what was asked
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.execute.cell import Cell, Outcome
from workbench.execute.plan import Plan
from workbench.execute.protocol import Advanced, Emit, Event, Executor, Lost, Started
from workbench.processes import birth_of
from workbench.store.files import explained, replace_file
from workbench.store.strict_json import to_json

if TYPE_CHECKING:
    from workbench.store.results import Store

SAVE_SECONDS = 1.0
"""How often progress.json is replaced at most, but for cells that begin."""


def sweep_folder(store: "Store", plan: Plan) -> Path:
    """Where the plan and its failures are kept."""
    return store.path / "sweeps" / plan.key


def cached_results(plan: Plan, store: "Store", *, deep: bool = False) -> dict[str, str]:
    """Key of the result by key of the cell, for those that the store answers.

    A damaged result is reported, set aside, and its cell is one to run.

    Args:
        plan: The cells.
        store: What may hold their results.
        deep: Check every byte of a result, not only the sizes of its files and ``result.json``.
    """
    found = {}
    for cell in plan.cells:
        request = plan.inputs.request(cell)
        key = store.find_request(request) if request else None
        if key is not None and store.look(key, deep=deep) is not None:
            found[cell.key] = key
    return found


@dataclass
class Progress:
    """Where a sweep stands; the seconds that are left are a guess from those that were needed."""

    total: int
    cached: int = 0
    computed: int = 0
    failed: int = 0
    running: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By key of the cell: worker, host, done and total of the cell."""
    started: float = field(default_factory=time.time)
    ended: bool = False
    """Whether nothing more will come, be it complete or not."""
    _clock: float = field(default_factory=lambda: time.monotonic())
    _ended: int = 0

    @property
    def done(self) -> int:
        """Cells that ended, in whatever way."""
        return self.cached + self.computed + self.failed

    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first cell has ended."""
        if self._ended == 0:
            return None
        return (time.monotonic() - self._clock) / self._ended * (self.total - self.done)

    def note(self, event: Event) -> None:
        """Take an event into account."""
        if isinstance(event, Started):
            self.running[event.cell] = {"worker": event.worker, "host": event.host}
        elif isinstance(event, Advanced):
            self.running.setdefault(event.cell, {}).update(done=event.done, total=event.total)
        elif isinstance(event, Lost):
            self.running.pop(event.cell, None)
        else:
            self.running.pop(event.cell, None)
            setattr(self, event.status, getattr(self, event.status) + 1)
            # What the store held took no time and says nothing of the pace.
            self._ended += event.status != "cached"

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        left = self.seconds_left()
        names = ("total", "done", "cached", "computed", "failed", "running", "started", "ended")
        return {name: getattr(self, name) for name in names} | {
            "seconds_left": None if left is None else round(left, 1),
            "updated": time.time(),
            # So that whoever reads it can tell a long cell from a sweep that was killed.
            "process": _this_process(),
        }


@cache
def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "birth": birth_of(os.getpid())}


@dataclass(frozen=True)
class Summary:
    """What a run of a plan came to."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    """One a cell, in the order of the plan."""
    seconds: float

    def count(self, status: str) -> int:
        """How many cells ended so."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """The cells that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


def run_plan(
    plan: Plan,
    store: "Store",
    executor: Executor,
    watch: Emit = lambda event: None,
    *,
    cached: Mapping[str, str] | None = None,
) -> Summary:
    """Run what the store does not hold; failed cells are kept on a list, and tried again next time.

    Args:
        plan: The cells.
        store: Where results are found and kept.
        executor: What runs the cells.
        watch: Told every event, the cells that were in the store first.
        cached: What ``cached_results`` found a moment ago; None: ask the store now.

    Raises:
        StoreError: The store cannot be written.
        EngineError: No worker can start.
    """
    start = time.monotonic()
    book = _Book(plan, store, watch)
    for cell, key in (cached_results(plan, store) if cached is None else cached).items():
        book.take(Outcome(cell, "cached", key))
    todo = [cell for cell in plan.cells if cell.key not in book.outcomes]
    try:
        if todo:
            executor.execute(todo, store.path, book.take)
    finally:
        book.end()
    outcomes = tuple(book.outcomes[cell.key] for cell in plan.cells)
    return Summary(book.folder, outcomes, time.monotonic() - start)


class _Book:
    """The folder of one sweep, written as events come in."""

    def __init__(self, plan: Plan, store: "Store", watch: Emit) -> None:
        self.folder, self._watch = sweep_folder(store, plan), watch
        self.progress = Progress(len(plan.cells))
        self.outcomes: dict[str, Outcome] = {}
        self._cells = {cell.key: cell for cell in plan.cells}
        self._saved = 0.0
        document = {
            "key": plan.key,
            "plan": plan.source,
            "resolved": plan.inputs.document(),
            "cells": [cell.document() for cell in plan.cells],
        }
        with explained("write", self.folder):
            replace_file(self.folder / "plan.json", to_json(document, indent=1).encode())
            # What failed before is tried again now.
            for name in ("failures.jsonl", "outcomes.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        self.save()  # a sweep that waits in a queue is there to be seen, and an older one's end is not

    def take(self, event: Event) -> None:
        """Note an event, and pass it on."""
        if isinstance(event, Outcome) and event.cell in self.outcomes:
            return  # two workers may have had it; the first word counts
        self.progress.note(event)
        if isinstance(event, Outcome):
            self.outcomes[event.cell] = event
            self._append("outcomes.jsonl", asdict(event) | {"details": None})
            if event.status == "failed":
                self._keep_failure(event)
        # A cell that has begun may be silent for long: what runs must be on the disk by then.
        if isinstance(event, Started) or time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()
        self._watch(event)

    def save(self) -> None:
        """Replace progress.json."""
        self._saved = time.monotonic()
        with explained("write", self.folder):
            replace_file(self.folder / "progress.json", to_json(self.progress.document()).encode())

    def end(self) -> None:
        """Say that nothing more will come."""
        self.progress.ended = True
        self.save()

    def _keep_failure(self, outcome: Outcome) -> None:
        cell = self._cells[outcome.cell]
        failure = {**asdict(outcome), "what": cell.describe(), "asked": cell.document()}
        self._append("failures.jsonl", failure)

    def _append(self, name: str, content: dict[str, Any]) -> None:
        with (
            explained("write", self.folder),
            (self.folder / name).open("a", encoding="utf-8") as file,
        ):
            file.write(to_json(content) + "\n")


def describe_cells(cells: Sequence[Cell]) -> str:
    """How many cells, models and probes, in a few words."""
    models = len({cell.model_text for cell in cells})
    probes = len({cell.probe for cell in cells})
    return (
        f"{len(cells)} cell{_s(len(cells))}: {probes} probe{_s(probes)}, {models} model{_s(models)}"
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"
