"""Sweeps as a page sees them: running, complete, with failures, stopped, killed, damaged."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

from app import jobs, sweeps
from app.job_log import numbers_of
from tests.app.opening import open_page, told
from workbench.execute.cell import Cell, Outcome
from workbench.execute.plan import Plan
from workbench.execute.protocol import Advanced, Started
from workbench.execute.sweep import run_plan
from workbench.models.names import demo_folder
from workbench.processes import birth_of
from workbench.store.results import Store


def cell(number):
    return Cell(
        f"{number:064d}", "attention-sinks", "demo", "random", {"threshold": number / 10}, {}
    )


PLAN = Plan(tuple(cell(number) for number in (1, 2, 3, 4)), {"models": ["demo"]})
KEY = PLAN.key


class Script:
    """An executor that tells what it was given, then looks, or breaks off."""

    name = "script"
    n_workers = 1

    def __init__(self, events, then=lambda: None):
        self._events, self._then = events, then

    def room(self, cells):
        return None

    def execute(self, cells, store, emit):
        for event in self._events:
            emit(event)
        self._then()


def ended(number, status, **more):
    return Outcome(cell(number).key, status, seconds=2.0, **more)


@pytest.fixture
def store(store_path, monkeypatch):
    monkeypatch.setattr("workbench.execute.sweep.cached_results", lambda plan, store: {})
    monkeypatch.setattr("workbench.execute.sweep.SAVE_SECONDS", 0.0)
    return Store(store_path)


def test_while_it_runs_the_whole_and_every_cell_are_told(store):
    seen = {}

    def look():
        (sweep,) = sweeps.listing(store.path)
        seen.update(sweep=sweep, cells=sweeps.cells(store.path, sweep))
        raise KeyboardInterrupt

    events = [
        Started(cell(1).key, "w1"),
        ended(1, "computed", result="c" * 64),
        Started(cell(2).key, "w1"),
        ended(2, "failed", error="too large"),
        Started(cell(3).key, "w1"),
        Advanced(cell(3).key, 5, 20),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_plan(PLAN, store, Script(events, look))
    sweep = seen["sweep"]
    assert (sweep.state, sweep.total, sweep.done, sweep.computed, sweep.failed) == (
        "running", 4, 2, 1, 1,
    )  # fmt: skip
    assert sweep.seconds_left is not None
    assert [(one.state, one.what.split("=")[1]) for one in seen["cells"]] == [
        ("failed", "0.2"), ("running", "0.3"), ("waiting", "0.4"), ("computed", "0.1"),
    ]  # fmt: skip
    failed, running, _, computed = seen["cells"]
    assert failed.error == "too large"
    assert (running.done, running.total, running.worker) == (5, 20, "w1")
    assert (computed.result, computed.seconds) == ("c" * 64, 2.0)
    # Ctrl-C has been told to the folder as well.
    assert sweeps.read(store.path, KEY).state == "stopped"


def test_a_cell_that_has_begun_is_told_at_once(store, monkeypatch):
    """It may say nothing more for minutes."""
    monkeypatch.setattr("workbench.execute.sweep.SAVE_SECONDS", 1e9)
    seen = []

    def look():
        sweep = sweeps.read(store.path, KEY)
        seen.extend(one.state for one in sweeps.cells(store.path, sweep))
        raise KeyboardInterrupt

    events = [ended(1, "computed"), Started(cell(2).key, "w1")]
    with pytest.raises(KeyboardInterrupt):
        run_plan(PLAN, store, Script(events, look))
    assert "running" in seen


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        (("computed",) * 4, "complete"),
        (("computed", "failed", "computed", "computed"), "with failures"),
    ],
)
def test_a_sweep_that_ended_says_how(store, statuses, state):
    events = [ended(number, status) for number, status in enumerate(statuses, start=1)]
    run_plan(PLAN, store, Script(events))
    sweep = sweeps.read(store.path, KEY)
    assert (sweep.state, sweep.done, sweep.seconds_left) == (state, 4, None)
    assert not [one for one in sweeps.cells(store.path, sweep) if one.state == "waiting"]


def progress(**changes):
    """A sweep's progress.json, of a sweep that runs in this process."""
    now = time.time()
    return {
        "total": 4, "done": 1, "cached": 0, "computed": 1, "failed": 0, "running": {},
        "started": now - 60, "updated": now - 10, "seconds_left": 100.0, "ended": False,
        "process": {"host": socket.gethostname(), "pid": os.getpid(), "birth": birth_of(os.getpid())},
        **changes,
    }  # fmt: skip


def written(store, **changes):
    folder = sweeps.sweeps_folder(store.path) / KEY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").write_text(json.dumps(progress(**changes)))
    return folder


def test_what_is_left_goes_down_between_two_tellings(store):
    written(store)
    assert sweeps.read(store.path, KEY).seconds_left == pytest.approx(90, abs=2)


def test_a_sweep_whose_process_was_killed_is_stopped(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = {"host": socket.gethostname(), "pid": child.pid, "birth": birth_of(child.pid)}
    written(store, process=process)
    assert sweeps.read(store.path, KEY).state == "running"
    child.kill()
    child.communicate()
    assert sweeps.read(store.path, KEY).state == "stopped"


def test_another_machines_sweep_runs_until_it_has_been_silent_for_long(store):
    there = {"host": "elsewhere", "pid": os.getpid(), "birth": "1"}
    written(store, process=there)
    assert sweeps.read(store.path, KEY).state == "running"
    written(store, process=there, updated=time.time() - sweeps.SILENT_SECONDS - 1)
    assert sweeps.read(store.path, KEY).state == "stopped"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"total": "many"}', '{"running": 3}'])
@pytest.mark.parametrize("name", ["progress.json", "plan.json", "outcomes.jsonl"])
def test_a_damaged_file_is_no_crash(store, name, content):
    folder = written(store)
    (folder / "plan.json").write_text(json.dumps({"cells": [cell(1).document(), {"key": 7}, 3]}))
    (folder / name).write_text(content)
    for sweep in sweeps.listing(store.path):
        assert sweep.state in sweeps.STATES
        assert all(one.state in sweeps.CELL_STATES for one in sweeps.cells(store.path, sweep))


@pytest.mark.parametrize("key", ["..", "../jobs", "", KEY.upper(), KEY[:-1]])
def test_what_is_no_key_is_no_path(store, key):
    written(store)
    assert sweeps.read(store.path, key) is None


# The page: a plan is checked, started as a job, looked at, stopped


PLAN_TEXT = """\
models: [demo]
probes: {attention-sinks: {threshold: [0.2, 0.3]}}
data: "builtin:natural"
n_pos: 16
limit: 1
"""

needs_demo = pytest.mark.skipif(
    not (demo_folder() / "config.json").is_file(), reason="needs the demo model"
)


def press(tab, label):
    next(button for button in tab.button if button.label == label).click().run()
    assert not tab.exception
    return tab


@pytest.fixture
def launched(monkeypatch):
    """The jobs that a page asks for, written down instead of started."""
    asked = []

    def launch(store, place, request):
        asked.append(request)
        now = {"pid": os.getpid(), "birth": birth_of(os.getpid())}
        (place / "status.json").write_text(json.dumps(now))
        document = {"kind": request.kind, "name": request.name, "about": request.about}
        (place / "request.json").write_text(json.dumps(document))

    monkeypatch.setattr(jobs, "_launch", launch)
    return asked


@needs_demo
def test_a_plan_is_counted_before_it_is_started(store_path, launched):
    tab = press(open_page("sweeps", plan=PLAN_TEXT), "What would run")
    assert "2 cells, of which the store holds 0 already" in told(tab)
    assert launched == []


@needs_demo
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [demo", "the plan must be YAML"),
        (PLAN_TEXT.replace("0.3", "7"), "threshold must be strictly between"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_before_anything_starts(
    text, words, store_path, launched
):
    tab = press(open_page("sweeps", plan=text), "Start the sweep")
    assert words in told(tab)
    assert launched == []
    assert "job" not in dict(tab.query_params)


@needs_demo
def test_a_sweep_is_started_as_a_job_and_chosen_when_it_has_begun(store_path, launched):
    tab = press(open_page("sweeps", plan=PLAN_TEXT, workers="2"), "Start the sweep")
    (request,) = launched
    plan = Path(request.arguments[1])
    assert plan.read_text() == PLAN_TEXT
    assert request.arguments[2:] == ("--workers=2", "--progress=json", "--json")
    assert dict(tab.query_params)["job"].startswith(request.hash)
    assert "running" in told(tab)  # its job, until the sweep says more
    folder = sweeps.sweeps_folder(store_path) / request.about["plan"]
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(progress()))
    again = open_page("sweeps", **dict(tab.query_params))
    (chosen,) = (box.value for box in again.selectbox if box.label == "Sweep")
    assert chosen == request.about["plan"]
    assert [button.label for button in again.button if button.label == "Stop"]
    # A second tab that starts the same plan finds the job.
    press(open_page("sweeps", plan=PLAN_TEXT, workers="2"), "Start the sweep")
    assert len(launched) == 1


@needs_demo
def test_stopping_a_sweep_cancels_its_job(store_path, launched, monkeypatch):
    press(open_page("sweeps", plan=PLAN_TEXT), "Start the sweep")
    folder = sweeps.sweeps_folder(store_path) / launched[0].about["plan"]
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(progress()))
    cancelled = []
    monkeypatch.setattr(jobs, "cancel", lambda job: cancelled.append(job.request.about["plan"]))
    press(open_page("sweeps"), "Stop")
    assert cancelled == [launched[0].about["plan"]]


def test_a_sweep_of_another_terminal_has_no_button(store):
    written(store)
    tab = open_page("sweeps")
    assert not tab.exception
    assert "Started elsewhere" in told(tab)
    assert not [button for button in tab.button if button.label == "Stop"]


def test_a_sweeps_progress_as_a_job_is_that_of_the_whole():
    line = '{"event": "advanced", "done": 7, "total": 9, "sweep": {"done": 1, "total": 2}}'
    assert numbers_of(line) == (1, 2)
