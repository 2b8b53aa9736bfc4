"""The dashboard's pages in a real browser: when the title stands, and when all of the page does.

Every visit is that of a new person: a browser context of its own, whose cache is empty, so that
Streamlit's program (8 MB of JavaScript) is loaded and compiled anew, and the page's run is not shared.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from record import Row, spread

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 90.0
PATIENCE_MS = 60_000
REPEATS = 3


@contextmanager
def serving(store: Path) -> Iterator[str]:
    """Run ``workbench app`` on a store, as a person starts it; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "workbench", "app", "--no-browser"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*line, "--store", str(store), "--port", str(port)], **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health"):
                break
            time.sleep(0.1)  # between two questions to a server that is starting
        yield address
    finally:
        server.terminate()
        server.wait(30)


def visit(browser: Any, address: str) -> tuple[float, float]:
    """Seconds until the title of a page is seen, and until its run has ended."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.get_by_role("heading", level=1).first.wait_for()
    title = time.perf_counter() - start
    page.locator("[data-test-script-state=notRunning]").wait_for()
    whole = time.perf_counter() - start
    context.close()
    return title, whole


def rows_in_browser(store: Path, pages: list[str]) -> list[Row]:
    """Two rows a page: until its title, and until the whole; none where there is no browser.

    Args:
        store: Of the server.
        pages: Their names; ``overview`` is the first page.
    """
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        print("no browser: playwright and a Chromium are needed", file=sys.stderr)
        return []
    rows = []
    with serving(store) as address, sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        visit(browser, address)  # the first of a server also imports
        for name in pages:
            path = "" if name == "overview" else name
            times = [visit(browser, f"{address}/{path}") for _ in range(REPEATS)]
            title, whole = (list(each) for each in zip(*times, strict=True))
            print(
                f"{name:20s} title {sorted(title)[1]:.2f} s, whole {sorted(whole)[1]:.2f} s",
                flush=True,
            )
            rows += [
                Row(name=name, peer="workbench, in Chromium: title", unit="s", **spread(title)),
                Row(name=name, peer="workbench, in Chromium: whole", unit="s", **spread(whole)),
            ]
        browser.close()
    return rows
