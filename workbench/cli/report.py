"""``workbench report``: the whole store as one page."""

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


def write_report(store: Path, output: Path, title: str = "Interpretability workbench") -> Path:
    """Write the report of a store and return its path.

    Raises:
        WorkbenchError: A package for figures is missing, or the place cannot be written.
    """
    from app.report import write_report as write
    from workbench.store.files import explained
    from workbench.store.results import Store

    with explained("write", output):
        write(Store(store), output, title=title)
    return output
