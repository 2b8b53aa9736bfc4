"""How a sweep's events are shown while it runs."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from workbench.cli.console import message
from workbench.execute.cell import Outcome
from workbench.execute.plan import Plan
from workbench.execute.protocol import Advanced, Emit, Event, Lost, Started, event_document
from workbench.execute.sweep import Progress


@contextmanager
def watching(style: str, plan: Plan) -> Iterator[Emit]:
    """What shows events.

    Args:
        style: ``bar``; ``json``: one JSON object a line; ``off``; ``auto``: a bar on a terminal,
            otherwise a line for every cell that ended.
        plan: The cells the events are about.
    """
    progress = Progress(len(plan.cells))
    if style == "off":
        yield progress.note
    elif style == "json":
        yield lambda event: _tell_machine(event, progress)
    elif style == "bar" or sys.stderr.isatty():
        with _bars(plan, progress) as watch:
            yield watch
    else:
        names = {cell.key: cell.describe() for cell in plan.cells}
        yield lambda event: _tell_person(event, progress, names)


def _tell_machine(event: Event, progress: Progress) -> None:
    progress.note(event)
    document = progress.document()
    totals = {name: document[name] for name in ("done", "total", "failed", "seconds_left")}
    sys.stderr.write(json.dumps({**event_document(event), "sweep": totals}) + "\n")


def _tell_person(event: Event, progress: Progress, names: Mapping[str, str]) -> None:
    progress.note(event)
    if isinstance(event, Started | Advanced):
        return
    text = names[event.cell]
    if isinstance(event, Lost):
        message(f"{text}: its worker died ({event.why}); tried again on a fresh one")
        return
    if event.status == "cached":
        return
    message(
        f"{progress.done}/{progress.total} {text}: {event.status} in {event.seconds:.2g} s{_left(progress)}"
    )


def _left(progress: Progress) -> str:
    left = progress.seconds_left()
    return f", about {left:.0f} s left" if left and progress.done < progress.total else ""


@contextmanager
def _bars(plan: Plan, progress: Progress) -> Iterator[Emit]:
    """One bar for the sweep, and one for each cell that runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    names = {cell.key: cell.describe() for cell in plan.cells}
    rows: dict[str, Any] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        total = bars.add_task("sweep", total=progress.total)

        def watch(event: Event) -> None:
            progress.note(event)
            if isinstance(event, Started):
                rows[event.cell] = bars.add_task(names[event.cell], total=None)
            elif isinstance(event, Advanced) and event.cell in rows:
                bars.update(rows[event.cell], completed=event.done, total=event.total)
            elif isinstance(event, Lost | Outcome) and event.cell in rows:
                bars.remove_task(rows.pop(event.cell))
            failed = f", {progress.failed} failed" if progress.failed else ""
            bars.update(
                total, completed=progress.done, description=f"sweep{failed}{_left(progress)}"
            )

        yield watch
