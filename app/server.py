"""Starts Streamlit's server on this machine alone."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from workbench.errors import ConfigError, WorkbenchError
from workbench.result import missing_package

ADDRESS = "127.0.0.1"
STOP_SECONDS = 5.0
"""After so long a server that was told to stop is stopped by force; jobs are not its children."""


def command(port: int, *, browser: bool) -> list[str]:
    """The command line of the server.

    Args:
        port: Where it listens.
        browser: Whether it opens one.
    """
    settings: dict[str, object] = {
        "server.address": ADDRESS,
        "server.port": port,
        "server.headless": not browser,
        "server.enableXsrfProtection": True,
        "server.enableCORS": True,
        # Another name for this address, resolved by somebody's name server, is refused.
        "server.allowedHosts": (ADDRESS, "localhost"),
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.maxUploadSize": 1,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": ADDRESS,
        # Tracebacks hold paths and texts: they go to the terminal, never to a browser.
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        "global.developmentMode": False,
        "logger.level": "warning",
        # Of both themes, so that neither is pinned: the browser's own wish decides.
        "theme.light.primaryColor": "#1f77c4",
        "theme.dark.primaryColor": "#5aa2e0",
    }
    main = Path(__file__).with_name("main.py")
    options = [
        f"--{name}={_text(value)}"
        for name, values in settings.items()
        for value in (values if isinstance(values, tuple) else (values,))
    ]
    return [sys.executable, "-m", "streamlit", "run", str(main), *options]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def serve(store: Path, port: int, *, browser: bool) -> int:
    """Run the server until it is stopped; returns its exit code.

    Raises:
        WorkbenchError: A package is missing.
        ConfigError: The port is taken.
    """
    for package in ("streamlit", "plotly", "pandas"):
        if find_spec(package) is None:
            raise WorkbenchError(missing_package("the dashboard", package, "view"))
    _refuse_taken(port)
    environment = {**os.environ, "WORKBENCH_HOME": str(store), "WORKBENCH_APP_WARM_UP": "1"}
    child = subprocess.Popen(command(port, browser=browser), env=environment)
    try:
        return child.wait()
    except (KeyboardInterrupt, SystemExit):
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # a page is in the middle of something long
            child.kill()
            child.wait()
        raise


def _refuse_taken(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise ConfigError(
                f"--port must be free; {port}: {(error.strerror or '').lower()}; choose another"
            ) from error
