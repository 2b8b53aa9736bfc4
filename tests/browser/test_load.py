"""Twenty browsers at once, and the server's memory over two hundred page views.

    python -m pytest tests/browser/test_load.py -m slow -s

docs/dashboard.md has the figures of the last run.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.browser.connection import connected
from tests.browser.test_pages import PAGES

pytestmark = pytest.mark.slow

N_BROWSERS = 20
VIEWS_AT_ONCE = 4
N_VISITS, VIEWS_A_VISIT = 8, 25
WARM_VISITS = 2
MOST_GROWTH_MB = 40.0
"""Over the views after the warm-up: 0.2 MB a view would be a leak of sessions or figures."""


def resident_mb(server):
    """Memory of the server's processes, the launcher's among them."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return sum(_resident_bytes(pid) for pid in (server.pid, *children)) / 1e6


def _resident_bytes(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tell(figure):
    """The figure of this run, with how busy the machine was, on stderr."""
    sys.stderr.write(f"\n{figure}, load {os.getloadavg()[0]:.1f}\n")


def paths(measured):
    """Every page, the probe's with a result, a head and another figure."""
    key = measured["stock"].key
    both = f"{key[:12]},{measured['edited'].key[:12]}"
    query = {"attention-sinks": {"key": key, "head": "L1H1"}, "compare": {"keys": both}}
    return [("" if name == "overview" else name, query.get(name, {})) for name in PAGES]


def test_twenty_browsers_at_once_see_no_error(server, open_tab, measured, expect):
    places = paths(measured)
    tabs = [open_tab() for _ in range(N_BROWSERS)]
    start = time.perf_counter()
    for number, tab in enumerate(tabs):
        path, query = places[number % len(places)]
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        # None waits for another: all twenty are asked for before the first has been painted.
        tab.page.goto(f"{server.url}/{path}?{asked}", wait_until="commit")
    for tab in tabs:
        tab.settle()
        expect(tab.page.get_by_test_id("stException")).to_have_count(0)
        assert tab.page.get_by_test_id("stAlertContentError").count() == 0
    tell(f"{N_BROWSERS} browsers painted in {time.perf_counter() - start:.1f} s")
    # Each of them still answers.
    for tab in tabs[:: len(places)]:
        tab.page.get_by_role("link", name="Jobs").click()
        expect(tab.page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_twenty_connections_at_once_see_no_error(server, measured):
    """The same for the server alone: what twenty browsers would draw is received and not drawn."""
    places = paths(measured)

    def visit(number):
        with connected(server) as tab:
            for step in range(VIEWS_AT_ONCE):  # each begins on another page
                path, query = places[(number + step) % len(places)]
                assert len(tab.view(path, **query)["heading"]) >= 1

    start = time.perf_counter()
    with ThreadPoolExecutor(N_BROWSERS) as people:
        list(people.map(visit, range(N_BROWSERS)))
    seconds = time.perf_counter() - start
    n_views = N_BROWSERS * VIEWS_AT_ONCE
    tell(
        f"{N_BROWSERS} connections, {n_views} views in {seconds:.1f} s, {resident_mb(server):.0f} MB"
    )
    assert "Traceback" not in server.told()


def test_two_hundred_page_views_keep_the_memory(server, measured):
    """People come, look at twenty-five pages each, and go: eight of them after two to warm up."""
    places = paths(measured)
    memory = []
    for _ in range(WARM_VISITS + N_VISITS):
        with connected(server) as tab:
            for number in range(VIEWS_A_VISIT):
                path, query = places[number % len(places)]
                tab.view(path, **query)
        memory.append(resident_mb(server))
        tell(f"memory {memory[-1]:.0f} MB after {len(memory) * VIEWS_A_VISIT} views")
    assert memory[-1] - memory[WARM_VISITS - 1] < MOST_GROWTH_MB
