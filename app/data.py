"""Cached reads of the store for the pages; imports no torch.

What is cached is shared by all tabs and must not be changed. Lists are read again after two
seconds, results are found by key and by when their folder was last changed.
"""

import importlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from workbench.errors import StoreError, WorkbenchError
from workbench.result import Result
from workbench.store.catalogue import Entry
from workbench.store.results import Store

LIST_SECONDS = 2.0
WARM_UP = "WORKBENCH_APP_WARM_UP"
"""The environment variable with which the server asks for imports in the background."""

# What drawing code raises on arrays of a shape it was not written for; see app/report.py.
UNDRAWABLE = (WorkbenchError, LookupError, TypeError, ValueError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class Listing:
    """The results of a store, the newest first, and what it says of those that it cannot show."""

    entries: tuple[Entry, ...]
    reports: tuple[str, ...]


def store_path() -> Path:
    """The store of this server: ``WORKBENCH_HOME``, which ``workbench app --store`` sets."""
    return Store().path


def listing() -> Listing:
    """The results of the store.

    Raises:
        StoreError: It cannot be read, or was there and has disappeared.
    """
    path = store_path()
    there = path.is_dir()
    if there:
        st.session_state["store seen"] = str(path)
    elif st.session_state.get("store seen") == str(path):
        raise StoreError(
            f"the store {path} was there and has disappeared; mount or restore the folder, or start "
            "the dashboard again with --store DIR"
        )
    return _listing(str(path)) if there else Listing((), ())


@st.cache_resource(ttl=LIST_SECONDS, show_spinner=False)
def _listing(path: str) -> Listing:
    reports: list[str] = []
    entries = Store(path, report=reports.append).list()
    return Listing(tuple(entries), tuple(reports))


def forget() -> None:
    """Read lists anew at once: something was published or set aside."""
    _listing.clear()


def entries_of(
    probe: str | None = None, model: str | None = None, edit: str | None = None
) -> list[Entry]:
    """The results of one probe, one model, one way of editing ("": stock), or all."""
    return [
        entry
        for entry in listing().entries
        if probe in (None, entry.probe)
        and model in (None, entry.model)
        and edit in (None, entry.edit)
    ]


def open_result(key: str) -> Result:
    """A result by its whole key.

    Raises:
        StoreError: There is none.
        DamagedResultError: It was damaged; it has been set aside.
    """
    store = Store(store_path(), report=lambda text: None)
    try:
        stamp = store.folder(key).stat().st_mtime_ns
    except OSError as error:
        raise store.absent(key) from error
    return _open_result(str(store.path), key, stamp)


@st.cache_resource(max_entries=32, show_spinner=False)
def _open_result(path: str, key: str, stamp: int) -> Result:
    try:
        return Store(path, report=lambda text: None).get(key)
    except StoreError:
        forget()
        raise


def figures_of(key: str) -> dict[str, Any]:
    """The plotly figures of a result, by name; copy one before changing it.

    Raises:
        WorkbenchError: They cannot be drawn.
    """
    return _figures(key, open_result(key))


@st.cache_resource(max_entries=24, show_spinner="drawing")
def _figures(key: str, _result: Result) -> dict[str, Any]:
    try:
        return _result.figures()
    except WorkbenchError:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("probes.figures."):
            return {}
        raise
    except UNDRAWABLE as error:
        text = str(error).strip().split("\n")[0]
        raise StoreError(
            f"the arrays of result {key[:12]} must be those that its probe draws; "
            f"{type(error).__name__}: {text}; run it again"
        ) from error


def finding_of(key: str) -> str:
    """The sentence that a probe's figures say about a result, "" where they say none."""
    return _finding(key, open_result(key))


@st.cache_resource(max_entries=64, show_spinner=False)
def _finding(key: str, _result: Result) -> str:
    import inspect

    from workbench.discovery import find_figures, find_probe

    try:
        say = getattr(inspect.getmodule(find_figures(find_probe(_result.probe))), "finding", None)
        return "" if say is None else str(say(_result.measured))
    except StoreError:  # damage is told once, by whoever meets it first
        forget()
        raise
    except (ModuleNotFoundError, *UNDRAWABLE):
        return ""


@st.cache_resource(max_entries=32, show_spinner=False)
def _table(key: str, _result: Result) -> dict[str, list[Any]]:
    return _result.table()


def table_of(key: str) -> dict[str, list[Any]]:
    """The columns of a result's headline table.

    Raises:
        StoreError: The arrays are not those of the result's probe.
    """
    try:
        return _table(key, open_result(key))
    except WorkbenchError:
        raise
    except UNDRAWABLE as error:
        raise StoreError(
            f"the arrays of result {key[:12]} must be those of its probe ({error}); run it again"
        ) from error


def models_by_use(entries: Sequence[Entry]) -> list[str]:
    """Model names, the one with most results first."""
    return [name for name, _ in Counter(entry.model for entry in entries).most_common()]


def warm_up() -> None:
    """Import what forms and figures need while a person looks at the first page.

    Only where ``workbench app`` asks for it: a test has no time to look.
    """
    if os.environ.get(WARM_UP):
        _warm_up()


@st.cache_resource(show_spinner=False)
def _warm_up() -> threading.Thread:
    def load() -> None:
        from workbench.discovery import load_probes

        load_probes()
        importlib.import_module("workbench.models.huggingface")

    thread = threading.Thread(target=load, daemon=True, name="warm up")
    thread.start()
    return thread
