"""One result: what it found, its figures, table, provenance, and everything to take away."""

import contextlib
from collections.abc import Callable

import pandas as pd
import streamlit as st

from app import data, jobs, url
from app.components.asked import asked_by_job, asked_by_provenance
from app.components.figures import show_figure
from app.components.links import page_link
from app.components.notebook import notebook
from app.components.text import flat, moment, plain
from workbench.card import number_text
from workbench.errors import WorkbenchError
from workbench.result import SHORT_KEY, Result
from workbench.store.catalogue import Entry
from workbench.store.formats import FORMATS

MOST_ROWS = 10_000
"""Rows of a table that a page shows; the download has all."""
MOST_TWINS = 50
"""Results of the stock model that are looked at for the one to compare with, the newest."""
MOST_OFFERED = 300
"""Results in a list to choose from, the newest; more by their key in the URL."""

MIMES = {
    ".json": "application/json",
    ".csv": "text/csv",
    ".parquet": "application/vnd.apache.parquet",
    ".html": "text/html",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


def label_of(entry: Entry) -> str:
    """A result in a list: when, on what, with which headline."""
    return f"{moment(entry.created)} · {entry.subject} · {entry.headline} · {entry.key[:8]}"


def choose_result(entries: list[Entry], scope: str, newest: str = "") -> str:
    """Choose one of some results, the newest by default; the key is in the URL."""
    labels = {entry.key: label_of(entry) for entry in entries[:MOST_OFFERED]}
    known = {entry.key: entry for entry in entries}
    widget = f"{scope} key"

    def parse(text: str) -> str:
        if text in known:
            return text
        from workbench.store.results import Store

        return Store(data.store_path(), report=lambda _: None).resolve(text)

    default = newest or next(iter(labels))
    url.seed("key", parse, default, widget)
    if newest and st.session_state.get(f"{scope} shown") != newest:
        st.session_state[widget] = st.session_state[f"{scope} shown"] = newest
    chosen = st.session_state[widget]
    options = list(labels) if chosen in labels else [chosen, *labels]
    if chosen in known:
        labels.setdefault(chosen, label_of(known[chosen]))
    more = f" (the newest {MOST_OFFERED} of {len(entries)})" if len(entries) > MOST_OFFERED else ""
    key = st.selectbox(
        f"Result{more}", options, key=widget, format_func=lambda key: labels.get(key, key[:12])
    )
    url.keep("key", key, next(iter(labels)))
    return str(key)


def result_view(key: str, scope: str) -> tuple[int, int] | None:
    """Show a result; returns the head that was clicked in one of its maps."""
    result = data.open_result(key)
    finding = data.finding_of(key)
    if result.edit:
        _edited(result)
    if finding:
        st.success(plain(finding), icon=":material/lightbulb:")
    _metrics(result)
    clicked = None
    try:
        clicked = _figures(key, scope)
    except WorkbenchError as error:
        st.error(plain(str(error)))
    with st.expander("Table"):
        _table(key)
    with st.expander("Settings and provenance"):
        _provenance(result)
    with st.expander("Download"):
        downloads(result, scope)
    return clicked


def _edited(result: Result) -> None:
    """Say under what it was measured, and lead to the comparison with the stock model."""
    st.info(plain(f"Measured on {result.model} under {result.edit}."), icon=":material/tune:")
    stock = stock_twin(result)
    if stock:
        keys = f"{stock[:SHORT_KEY]},{result.key[:SHORT_KEY]}"
        query = {"probe": result.probe, "keys": keys}
        page_link("compare", "Compare with the stock model", "compare_arrows", query)


def stock_twin(result: Result) -> str:
    """Key of the newest result that differs in nothing but the edit; "" where there is none."""
    alike = ("revision", "tokens", "dtype", "backend", "seed")
    for entry in data.entries_of(result.probe, result.model, edit="")[:MOST_TWINS]:
        with contextlib.suppress(WorkbenchError):
            other = data.open_result(entry.key)
            same = all(other.provenance.get(name) == result.provenance.get(name) for name in alike)
            if same and other.config == result.config:
                return entry.key
    return ""


def _metrics(result: Result) -> None:
    metrics = result.metrics()
    with st.container(horizontal=True, gap="large"):
        for name, value in list(metrics.items())[:4]:
            st.metric(plain(name.replace("_", " ")), number_text(value), width="content")
    if len(metrics) > 4:
        with st.expander(f"All {len(metrics)} numbers"):
            frame = pd.DataFrame(
                {
                    "metric": metrics.keys(),
                    "value": [number_text(value) for value in metrics.values()],
                }
            )
            st.dataframe(frame, hide_index=True)


def _figures(key: str, scope: str) -> tuple[int, int] | None:
    figures = data.figures_of(key)
    if not figures:
        st.info("This probe draws no figures; its numbers are in the table.")
        return None
    names = list(figures)
    widget = f"{scope} figure name"
    url.seed("figure", url.one_of(names, "figure"), names[0], widget)
    if st.session_state[widget] not in names:
        st.session_state[widget] = names[0]
    name = names[0]
    if len(names) > 1:
        name = st.selectbox(
            "Figure", names, key=widget, format_func=lambda name: name.replace("_", " ")
        )
    url.keep("figure", name, names[0])
    return show_figure(figures[name], name, f"{scope} {key[:SHORT_KEY]}")


def _table(key: str) -> None:
    try:
        frame = pd.DataFrame(data.table_of(key))
    except WorkbenchError as error:
        st.error(plain(str(error)))
        return
    if len(frame) > MOST_ROWS:
        st.caption(f"The first {MOST_ROWS} of {len(frame)} rows; the download has all.")
    st.dataframe(frame.head(MOST_ROWS), hide_index=True)


def _provenance(result: Result) -> None:
    identity = {"key": result.key, "probe": result.probe, "version": result.version}
    own = {name: value for name, value in result.provenance.items() if name != "config"}
    rows = list(flat({**identity, "config": result.config, **own}))
    st.dataframe(pd.DataFrame(rows, columns=["what", "value"]), hide_index=True)


def downloads(result: Result, scope: str) -> None:
    """Buttons that make their file when they are pressed."""
    base = f"{result.probe}-{result.key[:SHORT_KEY]}"
    st.markdown("Numbers")
    with st.container(horizontal=True):
        for suffix in (".json", ".csv", ".parquet"):
            _button(suffix, _made(FORMATS[suffix], result), base + suffix, suffix, scope)
    st.markdown("All figures on one page; the first figure as a picture")
    with st.container(horizontal=True):
        for suffix in (".html", ".png", ".svg"):
            _button(suffix, _made(FORMATS[suffix], result), base + suffix, suffix, scope)
    st.markdown("Open as notebook")
    job = next((job for job in jobs.listing(data.store_path()) if job.key == result.key), None)
    asked = asked_by_provenance(result) if job is None else asked_by_job(job)
    st.download_button(
        "Notebook (.ipynb)",
        notebook(result, data.store_path(), asked),
        f"{base}.ipynb",
        "application/x-ipynb+json",
        key=f"{scope} notebook {result.key}",
        on_click="ignore",
        icon=":material/note_stack:",
    )
    if asked is None:
        st.caption(
            "It was not started here, and where its model or prompts lie is not known: the notebook "
            "shows it and cannot measure it again."
        )


def _made(write: Callable[[Result], bytes], result: Result) -> Callable[[], bytes]:
    return lambda: write(result)


def _button(label: str, make: Callable[[], bytes], file: str, suffix: str, scope: str) -> None:
    st.download_button(
        label.lstrip(".").upper(),
        make,
        file,
        MIMES[suffix],
        key=f"{scope} download {file}",
        on_click="ignore",
    )
