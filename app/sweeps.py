"""Sweeps as their folders tell them: how far each is, and every cell of it.

A sweep is started on its page, as a job, or from the command line, on this machine or another one
that writes to the same store; here it is only looked at. What lies in a sweep's folder is told in
``workbench.execute.sweep``.
"""

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.execute.cell import Cell
from workbench.processes import is_alive
from workbench.store.strict_json import read_object, read_objects

KEY = re.compile(r"[0-9a-f]{64}")
SILENT_SECONDS = 600.0
"""A sweep on another machine that has told nothing for so long counts as ended."""
STATES = ("running", "complete", "with failures", "stopped")
CELL_STATES = ("failed", "running", "waiting", "computed", "cached")


@dataclass(frozen=True)
class SweepCell:
    """One cell as it stands."""

    key: str
    what: str
    state: str
    """One of CELL_STATES."""
    done: int = 0
    total: int = 0
    """Of the cell itself while it runs; 0 of 0 when it tells nothing."""
    seconds: float = 0.0
    result: str = ""
    """Key of its result."""
    error: str = ""
    worker: str = ""


@dataclass(frozen=True)
class Sweep:
    """Where a sweep stands."""

    key: str
    state: str
    """One of STATES."""
    total: int
    cached: int
    computed: int
    failed: int
    seconds: float
    """How long it has run, or ran."""
    seconds_left: float | None
    """A guess; None where nothing tells."""
    started: float
    """Unix time."""

    @property
    def done(self) -> int:
        """Cells that ended, in whatever way."""
        return self.cached + self.computed + self.failed

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return self.state == "running"


def sweeps_folder(store: Path) -> Path:
    """Where a store keeps its sweeps."""
    return store / "sweeps"


def listing(store: Path, limit: int = 200) -> list[Sweep]:
    """The sweeps of a store, the last that was started first."""
    try:
        names = [entry.name for entry in os.scandir(sweeps_folder(store))]
    except OSError:
        return []
    found = [sweep for name in names if (sweep := read(store, name)) is not None]
    return sorted(found, key=lambda sweep: sweep.started, reverse=True)[:limit]


def read(store: Path, key: str) -> Sweep | None:
    """A sweep by its key; None when there is none or its folder tells nothing."""
    if KEY.fullmatch(key) is None:
        return None
    progress = read_object(sweeps_folder(store) / key / "progress.json")
    if not progress:
        return None
    total, cached, computed, failed = (
        _count(progress.get(name)) for name in ("total", "cached", "computed", "failed")
    )
    started, updated = _time(progress.get("started")), _time(progress.get("updated"))
    whole = cached + computed + failed >= total
    running = not whole and not progress.get("ended") and _is_running(progress, updated)
    now = time.time()
    left = progress.get("seconds_left")
    if not running or not isinstance(left, int | float):
        left = None
    state = "running"
    if not running:
        state = "stopped" if not whole else "with failures" if failed else "complete"
    return Sweep(
        key, state, total, cached, computed, failed,
        max(0.0, (now if running else updated) - started),
        None if left is None else max(0.0, left - (now - updated)),
        started,
    )  # fmt: skip


def _is_running(progress: dict[str, Any], updated: float) -> bool:
    process = progress.get("process")
    process = process if isinstance(process, dict) else {}
    pid, birth = process.get("pid"), process.get("birth")
    if process.get("host") == socket.gethostname() and isinstance(pid, int):
        return is_alive(pid, birth if isinstance(birth, str) else None)
    return time.time() - updated < SILENT_SECONDS


def cells(store: Path, sweep: Sweep) -> list[SweepCell]:
    """Every cell of a sweep, failed and running ones first, else in the order of the plan."""
    folder = sweeps_folder(store) / sweep.key
    progress = read_object(folder / "progress.json").get("running") if sweep.is_running else None
    running = progress if isinstance(progress, dict) else {}
    ended = _outcomes(folder / "outcomes.jsonl")
    planned = read_object(folder / "plan.json").get("cells")
    found = [
        _cell(asked, running, ended)
        for asked in (planned if isinstance(planned, list) else ())
        if isinstance(asked, dict) and isinstance(asked.get("key"), str)
    ]
    return sorted(found, key=lambda cell: CELL_STATES.index(cell.state))


def _cell(
    asked: dict[str, Any], running: dict[str, Any], ended: dict[str, dict[str, Any]]
) -> SweepCell:
    key = asked["key"]
    what = _describe(asked)
    if key in ended:
        outcome = ended[key]
        status = str(outcome.get("status"))
        return SweepCell(
            key,
            what,
            status if status in CELL_STATES else "failed",
            seconds=_time(outcome.get("seconds")),
            result=str(outcome.get("result") or ""),
            error=str(outcome.get("error") or ""),
        )
    now = running.get(key)
    if not isinstance(now, dict):
        return SweepCell(key, what, "waiting")
    done, total = _count(now.get("done")), _count(now.get("total"))
    return SweepCell(key, what, "running", done, total, worker=str(now.get("worker", "")))


def _describe(asked: dict[str, Any]) -> str:
    try:
        return Cell(**asked).describe()
    except (TypeError, AttributeError):  # of another version of the workbench
        return f"{asked.get('probe', '?')} {asked.get('model', '?')}"


def _outcomes(path: Path) -> dict[str, dict[str, Any]]:
    return {str(outcome.get("cell")): outcome for outcome in read_objects(path)}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _time(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 < value < 1e11 else 0.0
