"""Models x probes: what has been measured, when, with which headline; and what has not."""

from typing import Any

import pandas as pd
import streamlit as st

from app import data, registry, url
from app.components.layout import page
from app.components.links import page_link
from app.components.text import moment, plain
from workbench.result import SHORT_KEY
from workbench.store.catalogue import Entry

MOST_MODELS = 500
"""Rows of the matrix, the models with most results."""
EMPTY = "-"
DEMO = "demo"
FIRST_PROBE = "attention-sinks"
"""The cell that is chosen before a person chooses one."""
STEPS = (
    (
        "Measure",
        "Run a probe on a model: where its attention goes, which heads do what.",
        FIRST_PROBE,
        "Look for attention sinks",
    ),
    (
        "Change",
        "Switch an intervention on and see both texts, stock and edited, side by side.",
        "playground",
        "Open the playground",
    ),
    (
        "Train",
        "Watch a toy transformer grow an attention sink, step by step.",
        "training",
        "Train a toy",
    ),
)
"""Title, meaning, page and link of each first step."""


def overview_page() -> None:
    """What is in the store, as a matrix; a cell leads to its results or starts a run."""
    with page("overview", "Interpretability workbench"):
        found = data.listing()
        if found.reports:
            with st.expander(
                f"{len(found.reports)} results cannot be shown", icon=":material/warning:"
            ):
                st.dataframe(pd.DataFrame({"reason": found.reports}), hide_index=True)
        entries = list(found.entries)
        used = data.models_by_use(entries)
        if entries:
            of = f"{_count(len(entries), 'result')} of {_count(len(used), 'model')}"
            st.caption(plain(f"{of} in {data.store_path()}"))
        else:
            _first_steps()
        newest, counts = _newest(entries)
        models = list(dict.fromkeys([*used[:MOST_MODELS], DEMO]))
        probes = list(dict.fromkeys([*registry.probe_names(), *(entry.probe for entry in entries)]))
        chosen = _matrix(models, probes, newest, counts)
        _cell(models, probes, newest, counts, chosen)
        _recent(entries)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _first_steps() -> None:
    """What somebody can do who has just opened the dashboard for the first time."""
    st.markdown(
        "**Nothing has been measured yet.** A small demo model is embedded, so every step below "
        "works without a download."
    )
    for column, (title, about, path, label) in zip(st.columns(3), STEPS, strict=True):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{title}**")
            st.caption(about)
            page_link(path, label, "arrow_forward", {})


Cells = dict[tuple[str, str], Entry]


def _newest(entries: list[Entry]) -> tuple[Cells, dict[tuple[str, str], int]]:
    newest: Cells = {}
    counts: dict[tuple[str, str], int] = {}
    for entry in entries:  # the newest come first
        cell = (entry.model, entry.probe)
        # A model's headline is that of the stock model, where it was measured.
        if cell not in newest or (newest[cell].edit and not entry.edit):
            newest[cell] = entry
        counts[cell] = counts.get(cell, 0) + 1
    return newest, counts


def _matrix(
    models: list[str], probes: list[str], newest: Cells, counts: dict[tuple[str, str], int]
) -> tuple[str, str] | None:
    def text(model: str, probe: str) -> str:
        entry = newest.get((model, probe))
        if entry is None:
            return EMPTY
        return f"{entry.headline.partition(',')[0]} · {entry.created[:10]} ({counts[model, probe]})"

    frame = pd.DataFrame(
        {probe: [text(model, probe) for model in models] for probe in probes},
        index=pd.Index(models, name="model"),
    )
    event: Any = st.dataframe(
        frame,
        key="overview matrix",
        on_select="rerun",
        selection_mode="single-cell",
        height=min(54 + 35 * len(models), 500),
        alt="models in rows, probes in columns; each cell has the newest headline and its date",
    )
    cells = event["selection"].get("cells", []) if event else []
    if not cells:
        return None
    row, column = cells[0]
    return (models[int(row)], str(column)) if column in probes else None


def _cell(
    models: list[str],
    probes: list[str],
    newest: Cells,
    counts: dict[tuple[str, str], int],
    clicked: tuple[str, str] | None,
) -> None:
    """The chosen cell: what is known, and a way on."""
    url.seed("model", url.one_of(models, "model"), models[0], "overview model")
    first = FIRST_PROBE if FIRST_PROBE in probes else probes[0]
    url.seed("probe", url.one_of(probes, "probe"), first, "overview probe")
    if clicked is not None and st.session_state.get("overview clicked") != clicked:
        st.session_state["overview model"], st.session_state["overview probe"] = clicked
    st.session_state["overview clicked"] = clicked
    for widget, options in (("overview model", models), ("overview probe", probes)):
        if st.session_state[widget] not in options:
            st.session_state[widget] = options[0]
    left, right = st.columns(2)
    model = left.selectbox("Model", models, key="overview model")
    probe = right.selectbox("Probe", probes, key="overview probe")
    url.keep("model", model, models[0])
    url.keep("probe", probe, first)
    entry = newest.get((model, probe))
    with st.container(border=True):
        if entry is None:
            st.markdown(f"{plain(probe)} has not been run on {plain(model)}.")
            page_link(
                probe, f"Start {probe}", "play_arrow", {"model": model} if model != "demo" else {}
            )
        else:
            more = counts[model, probe]
            st.markdown(f"**{plain(entry.headline)}**")
            st.caption(
                plain(f"{probe} on {entry.subject}, {moment(entry.created)} UTC, newest of {more}")
            )
            page_link(probe, "Open the newest result", "open_in_new", {"key": entry.key})


def _recent(entries: list[Entry]) -> None:
    if not entries:
        return
    st.subheader("Newest results")
    rows = [
        {
            "when (UTC)": moment(entry.created),
            "probe": entry.probe,
            "model": entry.subject,
            "headline": entry.headline,
            "key": entry.key[:SHORT_KEY],
        }
        for entry in entries[:50]
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True)
