"""``workbench report``: the whole store as one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import options as given
from workbench.cli.console import message


def report_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The page to write.")
    ] = Path("report.html"),
    store: given.StoreFolder = None,
) -> None:
    """Write every result of a store on one self-contained page."""
    given.check_output(output)
    from workbench.store.results import Store

    opened = Store(store)
    print(write_report(opened.path, output))
    message("next: open it in a browser")


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
