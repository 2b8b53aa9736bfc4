"""The dashboard's pages in a real browser: when the title stands, and when all of the page does.

The first visit is that of a new person: a browser context of its own, whose cache is empty, so that
Streamlit's program is loaded and compiled anew. The second is by the same person's address bar. The limit is
the first visit to a page of Streamlit that has nothing but a title.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from record import Row, spread

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 90.0
PATIENCE_MS = 60_000
REPEATS = 3


@contextmanager
def serving(*line: str) -> Iterator[str]:
    """Run a server of pages on any free port, which is added to its line; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", *line[:-1], f"{line[-1]}{port}"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            time.sleep(0.1)  # between two knocks at a server that is starting
        yield address
    finally:
        server.terminate()
        server.wait(30)


def visits(browser: Any, address: str) -> dict[str, float]:
    """Seconds until the title of a page is seen and until its run has ended, by a new person and again."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page, found = context.new_page(), {}
    for when in ("", ", again"):
        page.goto("about:blank")
        start = time.perf_counter()
        page.goto(address, wait_until="commit")
        page.get_by_role("heading", level=1).first.wait_for()
        found[f"title{when}"] = time.perf_counter() - start
        page.locator("[data-test-script-state=notRunning]").wait_for()
        found[f"whole{when}"] = time.perf_counter() - start
    context.close()
    return found


def repeated(browser: Any, address: str) -> dict[str, list[float]]:
    """The visits of some people, one after the other."""
    each = [visits(browser, address) for _ in range(REPEATS)]
    return {name: [one[name] for one in each] for name in each[0]}


def bare_page(browser: Any, folder: Path) -> dict[str, list[float]]:
    """The same of a page of Streamlit with a title and nothing else."""
    script = folder / "bare.py"
    script.write_text("import streamlit as st\n\nst.title('Nothing')\n", encoding="utf-8")
    options = [
        "--server.headless=true",
        "--server.address=127.0.0.1",
        "--server.fileWatcherType=none",
    ]
    options += ["--browser.gatherUsageStats=false", "--server.port="]
    with serving("streamlit", "run", str(script), *options) as address:
        visits(browser, address)
        return repeated(browser, address)


def rows_in_browser(store: Path, pages: list[str]) -> list[Row]:
    """Four rows a page: until its title and until the whole, twice; none where there is no browser.

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
    line = ("workbench", "app", "--no-browser", "--store", str(store), "--port=")
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        bare = bare_page(browser, Path(folder))
        with serving(*line) as address:
            visits(browser, address)  # the first of a server also imports
            for name in pages:
                times = repeated(browser, f"{address}/{'' if name == 'overview' else name}")
                for part, seconds in times.items():
                    rows.append(_row(name, part, seconds, median(bare[part])))
                said = ", ".join(f"{part} {median(times[part]):.2f} s" for part in times)
                print(f"{name:20s} {said}", flush=True)
        browser.close()
    return rows


def _row(name: str, part: str, seconds: list[float], limit: float) -> Row:
    about: dict[str, Any] = {"name": name, "peer": f"workbench, in Chromium: {part}", "unit": "s"}
    return Row(**about, **spread(seconds), limit=limit, distance=median(seconds) / limit)
