"""``workbench report``: a whole store, or one sweep, as one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options as given
from workbench.cli.console import message

if TYPE_CHECKING:
    from workbench.store.results import Store


def report_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The page to write.")
    ] = Path("report.html"),
    store: given.StoreFolder = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Only this sweep's results: a folder's name in STORE/sweeps, or its beginning.",
        ),
    ] = None,
) -> None:
    """Write the results of a store, or of one sweep, on one self-contained page."""
    given.check_output(output)
    from workbench.store.results import Store

    opened = Store(store)
    if sweep is None:
        print(write_report(opened.path, output))
    else:
        print(_write_sweep(opened, sweep, output))
    message("next: open it in a browser")


def _write_sweep(store: "Store", name: str, output: Path) -> Path:
    """Write the results of one sweep in the plan's order, and what it has no result for."""
    from app.report import write_report as write
    from workbench.execute.kept import read_sweep
    from workbench.result import SHORT_KEY

    found = read_sweep(store, name)
    return write(
        store,
        output,
        title=f"Sweep {found.key[:SHORT_KEY]}",
        keys=found.results,
        missing=found.missing,
    )


def write_report(
    store: Path,
    output: Path,
    title: str = "Interpretability workbench",
    keys: Sequence[str] | None = None,
) -> Path:
    """Write the report of a store (of some keys, in their order) and return its path.

    Raises:
        WorkbenchError: The store is empty, plotly is missing, or the place cannot be written.
    """
    from app.report import write_report as write
    from workbench.store.results import Store

    return write(Store(store), output, title=title, keys=keys)
