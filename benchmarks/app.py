"""The dashboard on a store of 5,000 results: first paint of each page, and the list behind it.

Each page is run as Streamlit runs it, without a browser, in a process that has served a page
before (the first request of a server also imports Streamlit's own parts). "empty caches" reads
the store anew; "again" is what a person meets who goes back and forth. Where there is a Chromium each page
is also opened in it (``app_browser.py``).

    python benchmarks/app.py [--results 5000] [--store DIR] [--no-browser]
"""

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from app_browser import rows_in_browser
from record import Row, spread, write_record

OWN = ("overview", "compare", "playground", "training", "jobs", "sweeps")
"""Pages that are no probe's."""
MODELS = 40
LIMIT_SECONDS = 2.0
REPEATS = 3


def fill(store: Path, n_results: int) -> None:
    """Measure attention sinks of the demo model once and keep it under many keys and model names."""
    import workbench as wb
    from workbench.result import Result
    from workbench.store.results import Store

    found = wb.run("attention-sinks", "demo", "builtin:natural", n_pos=64, limit=8)
    opened = Store(store)
    for number in range(n_results):
        about = {
            "model": f"model-{number % MODELS}",
            "created": f"2026-01-{1 + number % 28:02d}T00:00:00+00:00",
        }
        copy = Result(
            key=hashlib.sha256(str(number).encode()).hexdigest(),
            probe=found.probe,
            version=found.version,
            config=found.config,
            arrays=found.arrays,
            metrics=found.metrics(),
            labels=found.labels,
            provenance={**found.provenance, **about},
        )
        opened.publish(copy)


def first_paint(page: str) -> tuple[float, float]:
    """Seconds of one run of a page for a new tab, and of the processor's time in it."""
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    import app

    tab = AppTest.from_file(str(Path(app.__path__[0]) / "main.py"), default_timeout=120)
    tab._page_hash = calc_hash("" if page == "overview" else page)
    start, busy = time.perf_counter(), time.process_time()
    tab.run()
    seconds = time.perf_counter() - start, time.process_time() - busy
    if tab.exception:
        raise RuntimeError(f"{page}: {tab.exception[0].value}")
    return seconds


def rows_of(page: str, clear: Callable[[], None]) -> list[Row]:
    """Visits of one page, caches empty and then full, and the processor's time of the former."""
    cold, busy = [], []
    for _ in range(REPEATS):
        clear()
        seconds, used = first_paint(page)
        cold.append(seconds)
        busy.append(used)
    warm = [first_paint(page)[0] for _ in range(REPEATS)]
    middle = [statistics.median(times) for times in (cold, busy, warm)]
    print("{:20s} {:.2f} s, of the processor {:.2f} s, again {:.2f} s".format(page, *middle))
    load = f"over {LIMIT_SECONDS:g} s, at a load of {os.getloadavg()[0]:.1f}"
    late = "" if max(cold) < LIMIT_SECONDS else load
    return [
        Row(name=page, peer="workbench, empty caches", unit="s", note=late, **spread(cold)),
        Row(name=page, peer="workbench, empty caches, CPU time", unit="s", **spread(busy)),
        Row(name=page, peer="workbench, again", unit="s", **spread(warm)),
    ]


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=int, default=5000)
    parser.add_argument("--store", type=Path)
    parser.add_argument(
        "--browser",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also as Chromium paints them, where there is one",
    )
    given = parser.parse_args()
    # This file's folder comes first on the path, and in it this file is called app.
    sys.path.remove(str(Path(__file__).resolve().parent))
    with tempfile.TemporaryDirectory() as folder:
        store = given.store or Path(folder) / "store"
        if not store.exists():
            fill(store, given.results)
        os.environ["WORKBENCH_HOME"] = str(store)
        os.environ["STREAMLIT_LOGGER_LEVEL"] = "error"
        import streamlit as st

        from app import data, registry
        from workbench.discovery import load_probes

        load_probes()
        first_paint("attention-sinks")
        st.cache_resource.clear()
        start = time.perf_counter()
        entries = data.entries_of()
        print(
            f"list of {len(entries)} results, first time in this process: {time.perf_counter() - start:.2f} s"
        )
        st.cache_resource.clear()
        start = time.perf_counter()
        data.entries_of()
        print(f"list again, caches empty: {time.perf_counter() - start:.2f} s\n")
        rows: list[Row] = []
        pages = [*OWN, *registry.probe_names()]
        for page in pages:
            rows += rows_of(page, st.cache_resource.clear)
        painted = rows_in_browser(store, pages) if given.browser else []
    write_record(
        "app",
        [*rows, *painted],
        command=f"python benchmarks/app.py --results {given.results}",
        ratio_means="not compared with anything: no other program shows these pages",
        conditions=f"{given.results} results; {REPEATS} visits of a page"
        + ", without a browser" * (not painted),
        packages=("torch", "streamlit", "plotly"),
    )


if __name__ == "__main__":
    main()
