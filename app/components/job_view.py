"""What is seen of a job: progress, the end of its log, and the button that stops it."""

import streamlit as st

from app import data, jobs, url
from app.components.text import duration, plain

ICONS = {
    "starting": "hourglass_top",
    "running": "play_circle",
    "stopping": "pending",
    "done": "check_circle",
    "failed": "error",
    "cancelled": "cancel",
    "killed": "warning",
}
MEANINGS = {
    "killed": "its process ended without a word (out of memory, or the machine was restarted); "
    "finished parts are kept: start it again and it goes on",
    "cancelled": "it was stopped; finished parts are kept: start it again and it goes on",
}


def job_view(job_id: str, *, scope: str) -> None:
    """Follow a job: looked at every second while it runs, without running the page again."""
    job = jobs.read(data.store_path(), job_id)
    every = 1.0 if job is not None and job.is_running else None
    st.fragment(_look, run_every=every)(job_id, scope, every is not None)


def _look(job_id: str, scope: str, was_running: bool) -> None:
    job = look_at(job_id, "job", was_running=was_running)
    if job is not None:
        show_job(job, scope)


def look_at(job_id: str, kind: str, *, was_running: bool) -> jobs.Job | None:
    """A job as it is now, or a word that it is gone; has it just ended, the page runs again.

    Args:
        job_id: Of the job.
        kind: What people call it.
        was_running: At the last look.
    """
    job = jobs.read(data.store_path(), job_id)
    if job is None:
        st.warning(f"This {kind} is no longer in the store.")
    elif was_running and not job.is_running:
        data.forget()
        url.run_page_again()
    return job


def show_job(job: jobs.Job, scope: str) -> None:
    """One job as it is now."""
    head, button = st.columns([5, 1], vertical_alignment="center")
    with head:
        st.markdown(f":material/{ICONS[job.state]}: **{job.state}** · {duration(job.seconds)}")
        if job.is_running:
            share = min(job.done / job.total, 1.0) if job.total else 0.0
            text = f"{job.done} of {job.total}" if job.total else "no progress told yet"
            st.progress(share, text=text)
    with button:
        can_stop = job.is_running and job.state != "stopping"
        if can_stop and st.button("Cancel", key=f"{scope} cancel {job.id}"):
            jobs.cancel(job)
            url.run_page_again()
    if job.state == "failed":
        st.error(plain(job.message or "it failed without saying why; see the log"))
    elif job.state in MEANINGS:
        st.info(plain(MEANINGS[job.state]))
    elif job.message:
        st.caption(plain(job.message))
    with st.expander("Log"):
        st.code(jobs.log_tail(job) or "(empty)", language=None, wrap_lines=True)
