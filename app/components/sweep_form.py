"""The form that starts a sweep as a job, and that job until the sweep itself can be looked at."""

from pathlib import Path

import streamlit as st

from app import data, jobs, sweeps, url
from app.components.job_view import show_job
from app.components.pickers import keep_plan
from app.components.run_form import job_of_url
from app.components.text import plain
from app.components.text_area import url_text_area
from workbench.errors import WorkbenchError
from workbench.result import SHORT_KEY

EXAMPLE = """\
models: [demo]
probes:
  attention-sinks: {threshold: [0.2, 0.3]}
data: "builtin:natural"
n_pos: 32
limit: 4
seeds: [0, 1]
"""
MOST_WORKERS = 64


def sweep_form() -> None:
    """A plan as YAML; one button says what would run, the other starts it on this machine."""
    text = url_text_area("plan", "Plan (YAML)", EXAMPLE, "sweep plan", height=220)
    url.seed("workers", url.whole(1, MOST_WORKERS, "workers"), None, "sweep workers")
    workers = st.number_input(
        "Workers",
        1,
        MOST_WORKERS,
        value=None,
        step=1,
        key="sweep workers",
        placeholder="one a GPU, else one",
        help="Cells at once, each in a process of its own on this machine.",
    )
    url.keep("workers", "" if workers is None else str(workers))
    with st.container(horizontal=True):
        look = st.button("What would run")
        start = st.button("Start the sweep", type="primary")
    if not (look or start):
        return
    try:
        path = Path(keep_plan(text))
        key, n_cells, n_kept = _expanded(path)
        if start:
            _start(path, key, n_cells, None if workers is None else int(workers))
    except WorkbenchError as error:
        st.error(plain(str(error)))
        return
    cells = "1 cell" if n_cells == 1 else f"{n_cells} cells"
    st.caption(f"{cells}, of which the store holds {n_kept} already.")


def _expanded(path: Path) -> tuple[str, int, int]:
    """Key of a plan, its cells, and how many of them are in the store; refuses what cannot be run."""
    from workbench.execute.plan import make_plan
    from workbench.execute.plan_file import read_plan
    from workbench.execute.sweep import cached_results
    from workbench.store.results import Store

    store = Store(data.store_path(), report=lambda _: None)
    plan = make_plan(read_plan(path), store.path / "hashes")
    return plan.key, len(plan.cells), len(cached_results(plan, store))


def _start(path: Path, key: str, n_cells: int, workers: int | None) -> None:
    more = () if workers is None else (f"--workers={workers}",)
    arguments = ("sweep", str(path), *more, "--progress=json", "--json")
    request = jobs.Request("sweep", "sweep", arguments, {"plan": key, "cells": n_cells})
    job, _ = jobs.start(data.store_path(), request)
    url.go("job", job.id)
    url.run_page_again()


def running_job(plan: str) -> jobs.Job | None:
    """The job that runs a plan; None: its sweep was started elsewhere."""
    found = jobs.listing(data.store_path())
    ours = (job for job in found if job.request.kind == "sweep" and job.is_running)
    return next((job for job in ours if job.request.about.get("plan") == plan), None)


def started_job() -> None:
    """Show the job that the URL names until its sweep says more, or why there is none."""
    job_id = job_of_url("sweeps")
    job = jobs.read(data.store_path(), job_id) if job_id else None
    if job is None or job.state == "done":
        return
    if not job.is_running:
        with st.container(border=True):
            show_job(job, "sweeps")
    elif not _has_begun(job):
        with st.container(border=True):
            st.fragment(_wait, run_every=1.0)(job.id)


def _has_begun(job: jobs.Job) -> bool:
    sweep = sweeps.read(data.store_path(), str(job.request.about.get("plan", "")))
    return sweep is not None and sweep.is_running


def _wait(job_id: str) -> None:
    """Look until the sweep has begun, and choose it then; or until the job has ended."""
    job = jobs.read(data.store_path(), job_id)
    if job is not None and job.is_running and not _has_begun(job):
        show_job(job, "sweeps")
        return
    data.forget()
    if job is not None and _has_begun(job):
        url.go("sweep", str(job.request.about["plan"])[:SHORT_KEY])
    url.run_page_again()
