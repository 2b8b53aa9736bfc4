"""Pages of the dashboard opened without a browser, and planted results for them to show."""

import hashlib
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import app
from tests.probes.figures.planted import planted_result
from workbench.discovery import find_probe
from workbench.models.names import demo_folder
from workbench.result import Result
from workbench.store.results import Store

MAIN = str(Path(app.__path__[0]) / "main.py")
OWN = ("overview", "compare", "playground", "training", "jobs", "sweeps")
EVIL = "<img src=x onerror=alert(1)> **bold** :smile: $x$ [a](https://b.example)"

needs_demo = pytest.mark.skipif(
    not (demo_folder() / "config.json").is_file(), reason="needs the demo model"
)


def open_page(page, **query):
    tab = AppTest.from_file(MAIN, default_timeout=120)
    # The public way to another page is for pages that are files; ours are made from the registry.
    tab._page_hash = calc_hash("" if page == "overview" else page)
    for name, value in query.items():
        tab.query_params[name] = value
    return tab.run()


def texts(tab, *kinds):
    return " ".join(str(shown.value) for kind in kinds for shown in getattr(tab, kind))


def told(tab):
    """What a page tells, escapes taken away."""
    seen = texts(tab, "error", "warning", "info", "success", "caption", "markdown", "title")
    return seen.replace("\\", "").replace("\u2060", "")


def key_of(name):
    return hashlib.sha256(name.encode()).hexdigest()


def keep(path, name="demo", model=None, measured=None):
    result = Result.from_measurement(
        find_probe("attention-sinks"),
        planted_result() if measured is None else measured,
        key=key_of(name),
        provenance={"model": model or name, "created": "2026-01-01", "prompts": {"source": EVIL}},
    )
    Store(path).publish(result)
    return result.key


def button(tab, label):
    return next(each for each in tab.button if each.label == label)
