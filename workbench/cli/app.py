"""``workbench app``: the dashboard in a browser, on this machine alone."""

from typing import Annotated

import typer

from workbench.cli import options as given
from workbench.cli.console import message


def app_command(
    store: given.StoreFolder = None,
    port: Annotated[
        int, typer.Option(metavar="N", min=1024, max=65535, help="Where it listens.")
    ] = 8501,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not open one; print the address only.")
    ] = False,
) -> None:
    """Open the dashboard: what was run, figures, new runs, toys, a playground.

    It listens on 127.0.0.1 only. Jobs that it started go on when it is stopped.
    """
    from app.server import ADDRESS, serve
    from workbench.store.results import Store

    place = Store(store).path
    message(f"dashboard of {place}: http://{ADDRESS}:{port} (Ctrl-C stops it; jobs go on)")
    code = serve(place, port, browser=not no_browser)
    if code:
        raise typer.Exit(1)
