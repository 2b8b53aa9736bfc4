"""A real server, a real Chromium, and what every test of a page may rely on.

Screenshots for the documentation come from the same journeys:

    WORKBENCH_SCREENSHOTS=docs/screenshots python -m pytest tests/browser -m browser
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench.models.names import demo_folder

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
PATIENCE_MS = 180_000
"""The machine may be busy; nothing waits longer than what it waits for takes."""
START_SECONDS = 90.0
MOST_BYTES = 190_000
"""Of a picture in all its colours."""
HIGHEST_PX = 2700
"""Of a picture: a head's page with its pattern."""
RENAME = """([before, after]) => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode())
        texts.currentNode.data = texts.currentNode.data.replaceAll(before, after);
}"""
"""A picture for the documentation holds no path of the machine that it was taken on."""
NEXT_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
SCREENSHOTS = os.environ.get("WORKBENCH_SCREENSHOTS")


def missing():
    """Why no browser can be driven here; None where one can."""
    for package in ("streamlit", "plotly", "playwright"):
        if importlib.util.find_spec(package) is None:
            return f"needs {package} (extras view and browser)"
    if CHROMIUM is None:
        return "needs a Chromium"
    return None if (demo_folder() / "config.json").is_file() else "needs the demo model"


@dataclass(frozen=True)
class Server:
    """``workbench app`` as a person starts it."""

    url: str
    store: Path
    log: Path
    pid: int

    def told(self):
        return self.log.read_text("utf-8", "replace")


@contextlib.contextmanager
def serving(folder):
    """A server on a store in a folder, on any free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store, log = folder / "store", folder / "server.log"
    line = [sys.executable, "-m", "workbench", "app", "--no-browser"]
    with log.open("wb") as file:
        child = subprocess.Popen(
            [*line, "--store", str(store), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    server = Server(f"http://127.0.0.1:{port}", store, log, child.pid)
    try:
        wait_for_answer(server, child)
        yield server
    finally:
        end_jobs(store)
        child.terminate()
        child.wait(30)


def wait_for_answer(server, child):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert child.poll() is None, server.told()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{server.url}/_stcore/health") as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)  # between two questions to a server that is starting
    raise AssertionError(f"the server did not answer: {server.told()}")


def end_jobs(store):
    from app import jobs

    for job in jobs.listing(store):
        if job.is_running:
            jobs.cancel(job, grace=0.0)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with serving(tmp_path_factory.mktemp("dashboard")) as started:
        yield started


@pytest.fixture(scope="session")
def chromium():
    if reason := missing():
        pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@dataclass
class Tab:
    """A browser's tab on the dashboard."""

    page: object
    server: Server

    def open(self, path="", **query):
        """Open a page, as from a link somebody was sent."""
        from urllib.parse import urlencode

        self.page.goto(f"{self.server.url}/{path}?{urlencode(query)}")
        self.settle()
        return self.page

    def settle(self):
        """Wait until the page has been painted and its run has ended."""
        self.page.get_by_role("heading", level=1).first.wait_for()
        self.page.locator("[data-test-script-state=notRunning]").wait_for()

    def choose(self, label, text):
        """Choose from a list by typing, as a person without a mouse does."""
        box = self.page.get_by_role("combobox", name=label)
        if box.input_value() == text:
            return
        box.focus()
        self.page.evaluate(NEXT_FRAMES)  # a list closes when the page scrolls under it
        box.fill(text)
        self.page.get_by_role("option", name=text).first.wait_for()
        box.press("Enter")
        self.settle()

    def shoot(self, name):
        """Keep a picture for the documentation, where that was asked for."""
        if not SCREENSHOTS:
            return
        from PIL import Image

        self.settle()
        # The parts of the browser's own program come one by one; grey bars stand in their places.
        self.page.wait_for_function(
            "() => !document.querySelector('[data-testid=stSkeleton], [data-testid=stAppSkeleton]')"
        )
        width = self.page.viewport_size["width"]
        self.page.set_viewport_size({"width": width, "height": 700})
        main = self.page.get_by_test_id("stMain")
        height = min(main.evaluate("main => main.scrollHeight"), HIGHEST_PX)
        self.page.set_viewport_size({"width": width, "height": height})
        main.evaluate("main => main.scrollTo(0, 0)")
        self.page.wait_for_timeout(1500)  # figures are drawn again for the new size
        self.page.evaluate(RENAME, [str(self.server.store), "my-store"])
        path = Path(SCREENSHOTS) / f"{name}.png"
        self.page.screenshot(path=path)
        picture = Image.open(path).convert("RGB")
        picture.save(path, optimize=True)
        if path.stat().st_size > MOST_BYTES:
            picture.quantize(256).save(path, optimize=True)


@pytest.fixture
def open_tab(server, chromium):
    """Makes tabs, each with cookies of its own; at the end none of them may show an error."""
    contexts, broken = [], []

    def make(**options):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: broken.append(str(error)))
        return Tab(page, server)

    yield make
    for context in contexts:
        for page in context.pages:
            assert page.get_by_test_id("stException").count() == 0, "a page shows an exception"
        context.close()
    assert broken == []
    assert "Traceback" not in server.told()


@pytest.fixture
def expect(chromium):
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect

    return expect


@pytest.fixture
def tab(open_tab):
    return open_tab()


@pytest.fixture(scope="session")
def measured(server):
    """Two results of the demo model, stock and with one head edited, by name."""
    import workbench as wb

    def run(**more):
        return wb.run(
            "attention-sinks",
            "demo",
            "builtin:natural",
            n_pos=32,
            limit=2,
            store=server.store,
            **more,
        )

    edit = {"name": "zerotuning", "gamma": 4.0, "heads": [[0, 1]]}
    return {"stock": run(), "edited": run(intervention=edit)}
