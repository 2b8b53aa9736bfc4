"""What a person sees: results on stdout, messages and progress on stderr."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.card import number_text
from workbench.errors import UnknownNameError

if TYPE_CHECKING:
    from workbench.run import Reporter

STYLES = ("auto", "bar", "json", "off")
"""How progress can be shown."""

_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def message(text: str) -> None:
    """Tell a person something that is not a result."""
    sys.stderr.write(f"{text}\n")


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    from workbench.store.strict_json import to_json

    sys.stdout.write(to_json(value) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    least_width: int = _WIDTH,
) -> None:
    """Print a table without frames; what does not fit is folded, never cut.

    Args:
        columns: Their names.
        rows: Cells as text.
        title: Above it.
        least_width: Columns of text that there are at least where no terminal sets them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # "[red]" in somebody's text is text, not markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, least_width)
    # Not printed directly: rich would turn a closed pipe into exit code 1.
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write(capture.get())


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print headline numbers, one a line."""
    print_table(("metric", "value"), [(name, number_text(v)) for name, v in metrics.items()])


@contextmanager
def reporting(style: str, *, live: bool = False) -> Iterator["Reporter"]:
    """Give a run something to report to.

    Args:
        style: ``bar``; ``json``: one JSON object a line; ``off``; ``auto``: a bar on a terminal,
            otherwise only messages.
        live: Print messages at once; else only when the work has been done, so that a failure
            stays one line.

    Raises:
        UnknownNameError: Another style.
    """
    if style not in STYLES:
        raise UnknownNameError("progress style", style, STYLES)
    from workbench.run import Reporter

    if style == "off":
        yield Reporter()
    elif style == "json":
        yield Reporter(
            lambda done, total: message(json.dumps({"done": done, "total": total})),
            lambda text: message(json.dumps({"message": text})),
            lambda text: message(json.dumps({"status": text})),
        )
    elif style == "bar" or sys.stderr.isatty():
        with _bar() as reporter:
            yield reporter
    elif live:
        yield Reporter(message=message)
    else:
        held: list[str] = []
        yield Reporter(message=held.append)
        for text in held:
            message(text)


@contextmanager
def _bar() -> Iterator["Reporter"]:
    from rich.console import Console
    from rich.progress import Progress

    from workbench.run import Reporter

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("prompts", total=None)
        yield Reporter(
            lambda done, total: progress.update(task, completed=done, total=total),
            console.print,
            lambda text: progress.update(task, description=text),
        )
