"""The jobs of the store: running and finished, progress, end of the log, cancel."""

import pandas as pd
import streamlit as st

from app import data, jobs, sweeps, url
from app.components.job_view import job_view
from app.components.layout import page
from app.components.links import page_link
from app.components.text import duration, moment, plain
from workbench.errors import ConfigError
from workbench.result import SHORT_KEY

FINISHED = ("all", "running", "done", "failed", "cancelled", "killed")


def jobs_page() -> None:
    """Every job of the store, whichever tab or server started it."""
    with page("jobs", "Jobs"):
        data.listing()  # says when the store has disappeared
        found = jobs.listing(data.store_path())
        shown = _filtered(found)
        if not found:
            st.info("No job has been started on this store. Start one on a probe's page.")
            _choose([])
            return
        _table(shown)
        job = _choose(shown)
        if job is None:
            return
        with st.container(border=True):
            st.markdown(f"**{plain(title_of(job))}**")
            st.code("workbench " + " ".join(job.request.arguments), language=None, wrap_lines=True)
            job_view(job.id, scope="jobs")
            _lead_on(job)


def _lead_on(job: jobs.Job) -> None:
    """A link to what a job has made, or makes."""
    plan = str(job.request.about.get("plan", ""))
    if job.request.kind == "sweep":
        if sweeps.read(data.store_path(), plan) is not None:
            query = {"sweep": plan[:SHORT_KEY]}
            page_link("sweeps", "Look at the sweep", "open_in_new", query)
    elif job.state == "done" and job.request.kind == "train":
        page_link("training", "Look at the training", "open_in_new", {"job": job.id})
    elif job.state == "done" and job.key:
        page_link(job.request.name, "Open its result", "open_in_new", {"key": job.key})


def title_of(job: jobs.Job) -> str:
    """A job in a list."""
    model, cells = (job.request.about.get(name) for name in ("model", "cells"))
    more = f" on {model}" if model else f" of {cells} cells" if cells else ""
    return f"{job.request.name}{more}"


def _filtered(found: list[jobs.Job]) -> list[jobs.Job]:
    url.seed("state", url.one_of(FINISHED, "state"), "all", "jobs state")
    state = st.segmented_control("Which", FINISHED, key="jobs state", required=True) or "all"
    url.keep("state", state, "all")
    if state == "all":
        return found
    return [job for job in found if job.state == state or (state == "running" and job.is_running)]


def _table(shown: list[jobs.Job]) -> None:
    rows = [
        {
            "state": job.state,
            "what": title_of(job),
            "progress": f"{job.done}/{job.total}" if job.total else "",
            "started (UTC)": moment(job.created),
            "took": duration(job.seconds),
            "told": job.message if job.state != "done" else "",
            "id": job.id,
        }
        for job in shown
    ]
    if rows:
        st.dataframe(pd.DataFrame(rows), hide_index=True)
    else:
        st.caption("None of this kind.")


def _choose(shown: list[jobs.Job]) -> jobs.Job | None:
    by_id = {job.id: job for job in shown}

    def parse(text: str) -> str:
        if jobs.read(data.store_path(), text) is None:
            raise ConfigError(f"job must be the id of a job of this store; got {text!r}")
        return text

    url.seed("job", parse, next(iter(by_id), ""), "jobs job")
    chosen = st.session_state["jobs job"]
    job = by_id.get(chosen) or (jobs.read(data.store_path(), chosen) if chosen else None)
    if job is not None:
        by_id.setdefault(job.id, job)
    if not by_id:
        return None
    if job is None:
        st.session_state["jobs job"] = next(iter(by_id))
    chosen = st.selectbox(
        "Job",
        list(by_id),
        key="jobs job",
        # Nothing that changes while it runs: a browser keeps the text of what it has chosen.
        format_func=lambda job_id: (
            f"{title_of(by_id[job_id])} · {moment(by_id[job_id].created)} · {job_id[:6]}"
        ),
    )
    url.keep("job", chosen)
    return by_id[chosen]
