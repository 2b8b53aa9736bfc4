"""The sweeps of the store: the whole with the time that is left, every cell, what failed and why."""

from typing import Any

import pandas as pd
import streamlit as st

from app import data, jobs, sweeps, url
from app.components.layout import page
from app.components.links import page_link
from app.components.sweep_form import running_job, started_job, sweep_form
from app.components.text import duration, moment, plain
from app.pacing import LOOK_SECONDS
from workbench.errors import ConfigError
from workbench.result import SHORT_KEY

MOST_CELLS = 1000
"""Rows of the table of cells: failed and running ones are among the first."""
MOST_BARS = 8
"""Running cells that get a bar of their own."""
MOST_REASONS = 3
"""Different errors that are shown above the table."""
FILTERS = ("all", *sweeps.CELL_STATES)
ICONS = {
    "running": "play_circle",
    "complete": "check_circle",
    "with failures": "error",
    "stopped": "warning",
}


def sweeps_page() -> None:
    """Many runs of one plan, wherever they were started."""
    with page("sweeps", "Sweeps"):
        data.listing()  # says when the store has disappeared
        found = sweeps.listing(data.store_path())
        with st.expander("Start a sweep", expanded=not found, icon=":material/play_arrow:"):
            sweep_form()
        started_job()
        key = _choose(found)
        if key is None:
            st.info("No sweep has been started on this store yet. Start one above.")
            return
        is_running = any(sweep.key == key and sweep.is_running for sweep in found)
        st.fragment(_watch, run_every=LOOK_SECONDS if is_running else None)(key, is_running)


def _choose(found: list[sweeps.Sweep]) -> str | None:
    by_key = {sweep.key: sweep for sweep in found}

    def parse(text: str) -> str:
        fitting = [key for key in by_key if key.startswith(text)]
        if len(text) < 6 or len(fitting) != 1:
            raise ConfigError(f"sweep must be the key of a sweep of this store; got {text!r}")
        return fitting[0]

    url.seed("sweep", parse, next(iter(by_key), ""), "sweeps sweep")
    if not by_key:
        return None
    if st.session_state["sweeps sweep"] not in by_key:
        st.session_state["sweeps sweep"] = next(iter(by_key))
    chosen = st.selectbox(
        "Sweep", list(by_key), key="sweeps sweep", format_func=lambda key: _label(by_key[key])
    )
    url.keep("sweep", chosen[:SHORT_KEY])
    return str(chosen)


def _label(sweep: sweeps.Sweep) -> str:
    # Nothing that changes while it runs: a browser keeps the text of what it has chosen.
    return f"{sweep.total} cells · {moment(sweep.started)} · {sweep.key[:8]}"


def _watch(key: str, was_running: bool) -> None:
    url.begin_part()
    _look(key, was_running)
    url.end()


def _look(key: str, was_running: bool) -> None:
    sweep = sweeps.read(data.store_path(), key)
    if sweep is None:
        st.warning("This sweep is no longer in the store.")
        return
    if was_running and not sweep.is_running:
        data.forget()
        url.run_page_again()
    found = sweeps.cells(data.store_path(), sweep)
    with st.container(border=True):
        _whole(sweep)
        _running([cell for cell in found if cell.state == "running"])
    _failures([cell for cell in found if cell.state == "failed"])
    _cells(found)


def _whole(sweep: sweeps.Sweep) -> None:
    head, button = st.columns([5, 1], vertical_alignment="center")
    head.markdown(f":material/{ICONS[sweep.state]}: **{sweep.state}** · {duration(sweep.seconds)}")
    if sweep.is_running:
        with button:
            _stop(sweep)
    parts = [f"{sweep.done} of {sweep.total} cells"]
    parts += [f"{sweep.cached} were in the store"] if sweep.cached else []
    parts += [f"{sweep.failed} failed"] if sweep.failed else []
    if sweep.is_running:
        left = sweep.seconds_left
        parts.append("no guess yet" if left is None else f"about {duration(left)} left")
    st.progress(min(sweep.done / sweep.total, 1.0) if sweep.total else 0.0, text=", ".join(parts))
    if sweep.state == "stopped":
        st.caption("It was stopped before its end; started again it goes on where it stands.")
    elif sweep.failed and not sweep.is_running:
        st.caption("Started again it tries the failed cells once more.")


def _stop(sweep: sweeps.Sweep) -> None:
    """A button for a sweep that was started on this page; another's process is not ours to end."""
    job = running_job(sweep.key)
    if job is None:
        st.caption("Started elsewhere: stop it there.")
    elif job.state == "stopping":
        st.caption("Stopping.")
    elif st.button("Stop", key=f"sweeps stop {job.id}"):
        jobs.cancel(job)
        url.run_page_again()


def _running(cells: list[sweeps.SweepCell]) -> None:
    for cell in cells[:MOST_BARS]:
        told = f"{cell.done} of {cell.total}" if cell.total else "running"
        share = min(cell.done / cell.total, 1.0) if cell.total else 0.0
        st.progress(share, text=plain(f"{cell.what}: {told}"))
    if len(cells) > MOST_BARS:
        st.caption(f"{len(cells) - MOST_BARS} more cells run.")


def _failures(cells: list[sweeps.SweepCell]) -> None:
    """What failed, cells of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for cell in cells:
        by_reason.setdefault(cell.error or "no reason was told", []).append(cell.what)
    for reason, names in list(by_reason.items())[:MOST_REASONS]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        st.error(plain(f"{names[0]}{more}: {reason}"))
    if len(by_reason) > MOST_REASONS:
        st.caption(f"Other reasons: {len(by_reason) - MOST_REASONS}; they are in the table.")


def _cells(found: list[sweeps.SweepCell]) -> None:
    url.seed("cells", url.one_of(FILTERS, "cells"), "all", "sweeps cells")
    counts = {state: sum(cell.state == state for cell in found) for state in sweeps.CELL_STATES}
    shown = st.segmented_control(
        "Cells",
        FILTERS,
        key="sweeps cells",
        required=True,
        format_func=lambda state: f"{state} ({counts.get(state, len(found))})",
    )
    shown = shown or "all"
    url.keep("cells", shown, "all")
    chosen = [cell for cell in found if shown in ("all", cell.state)]
    if not chosen:
        st.caption("None of this kind.")
        return
    if len(chosen) > MOST_CELLS:
        st.caption(f"The first {MOST_CELLS} of {len(chosen)} cells.")
    chosen = chosen[:MOST_CELLS]
    event: Any = st.dataframe(
        pd.DataFrame([_row(cell) for cell in chosen]),
        hide_index=True,
        key="sweeps table",
        on_select="rerun",
        selection_mode="single-row",
        alt="one row a cell: its state, what it measures, how long it took, why it failed",
    )
    rows = event["selection"]["rows"] if event else []
    cell = chosen[rows[0]] if rows and rows[0] < len(chosen) else None
    if cell is None:
        st.caption("Choose a row to open its result.")
    elif cell.result:
        probe = cell.what.partition(" ")[0]
        page_link(probe, f"Open the result of {cell.what}", "open_in_new", {"key": cell.result})
    else:
        st.caption(plain(f"{cell.what} has no result: {cell.error or cell.state}"))


def _row(cell: sweeps.SweepCell) -> dict[str, str]:
    progress = f"{cell.done}/{cell.total}" if cell.total else ""
    return {
        "state": cell.state,
        "cell": cell.what,
        "progress": progress,
        "took": duration(cell.seconds) if cell.state in ("computed", "failed") else "",
        "error": cell.error,
        "result": cell.result[:SHORT_KEY],
    }
