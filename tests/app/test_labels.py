"""What a list calls an entry does not change while it runs: a browser keeps the text of what it has chosen."""

import json
import os
import time

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

from app import jobs, sweeps
from tests.app.opening import open_page
from workbench.processes import birth_of

JOB, SWEEP = "0123456789abcdef0000", "fedcba9876543210" * 4
RUNNING = {"pid": os.getpid(), "birth": birth_of(os.getpid())}


def put(folder, name, document):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))


def called(page, label):
    """What the entries of a list on a page are called."""
    tab = open_page(page)
    assert not tab.exception
    return next(box.options for box in tab.selectbox if box.label == label)


@pytest.mark.parametrize(("page", "label"), [("jobs", "Job"), ("training", "Training")])
def test_a_job_is_called_the_same_when_it_has_ended(store_path, page, label):
    folder = jobs.jobs_folder(store_path) / JOB
    put(folder, "request.json", {"kind": "train", "name": "bigram-backcopy", "about": {}})
    put(folder, "status.json", RUNNING)
    (running,) = called(page, label)
    assert running.endswith(JOB[:6])  # the last four digits count equal requests: mostly 0000
    put(folder, "status.json", {**RUNNING, "state": "done"})
    assert list(called(page, label)) == [running]


def test_a_sweep_is_called_the_same_when_it_has_ended(store_path):
    folder = sweeps.sweeps_folder(store_path) / SWEEP
    began = time.time() - 3
    shared = {"started": began, "total": 4, "counts": {}}
    process = {"host": os.uname().nodename, **RUNNING}
    put(
        folder,
        "progress.json",
        {**shared, "updated": began, "state": "running", "process": process},
    )
    (running,) = called("sweeps", "Sweep")
    assert SWEEP[:8] in running
    put(folder, "progress.json", {**shared, "updated": began + 60, "state": "complete"})
    assert list(called("sweeps", "Sweep")) == [running]
