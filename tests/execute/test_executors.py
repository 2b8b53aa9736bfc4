"""One suite for all executors: every cell ends once, a death costs one cell, results are run's."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests.execute.conftest import sinks
from workbench.execute.cell import Outcome
from workbench.execute.protocol import Advanced, Executor, Lost, Started, event_document
from workbench.execute.sweep import cached_results, run_plan

EDIT = {"name": "zerotuning", "gamma": 2.0}
# Layer 9 is not there: the cell fails, and is no reason to try it again.
BAD = {"name": "zero-heads", "heads": [[9, 0]]}


class Local:
    """Processes of this machine."""

    @staticmethod
    def make(n_workers):
        from workbench.execute.local import LocalExecutor

        return LocalExecutor(n_workers)

    @staticmethod
    def process(started):
        """The process that took up a cell."""
        return int(started.worker)


class Slurm(Local):
    """Jobs of submitit's local executor."""

    @staticmethod
    def make(n_workers):
        from workbench.execute.slurm import SlurmExecutor

        return SlurmExecutor(n_workers, {"timeout_min": "5"}, cluster="local")


class Ray:
    """Actors on two nodes."""

    @staticmethod
    def make(n_workers):
        from workbench.execute.ray import RayExecutor

        return RayExecutor(n_workers)

    @staticmethod
    def process(started):
        return int(started.host.split()[-1])


SLOW = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(
    params=[Local, pytest.param(Slurm, marks=SLOW), pytest.param(Ray, marks=SLOW)],
    ids=lambda kind: kind.__name__,
)
def kind(request):
    """How executors of one kind are made, and their workers killed."""
    if request.param is Ray:
        request.getfixturevalue("cluster")
    return request.param


def test_every_cell_ends_once_and_a_death_costs_one_try(kind, two_models, store):
    """A kill in the middle, a cell that fails, and a second run that goes on."""
    good = sinks(two_models, interventions=["none", EDIT])
    plan = sinks(two_models, interventions=["none", EDIT, BAD])
    executor = kind.make(1)
    assert isinstance(executor, Executor)
    events, killed = [], []

    def watch(event):
        events.append(event)
        if isinstance(event, Started) and not killed:
            killed.append(event.cell)
            os.kill(kind.process(event), signal.SIGKILL)

    summary = run_plan(plan, store, executor, watch)
    assert [event.cell for event in events if isinstance(event, Lost)] == killed
    ended = [event.cell for event in events if isinstance(event, Outcome)]
    assert sorted(ended) == sorted(cell.key for cell in plan.cells)
    assert (summary.count("computed"), summary.count("failed")) == (4, 2)
    assert {cell.key for cell in good.cells} == {
        one.cell for one in summary.outcomes if one.status == "computed"
    }
    for failure in summary.failures:
        assert "layer" in failure.error
        assert "\n" not in failure.error
        assert failure.details is None
    check_results(two_models, store, summary)
    # The same plan again: only what failed runs. Other numbers of workers: the test of an interrupt.
    again = []
    summary = run_plan(plan, store, kind.make(1), again.append)
    assert (summary.count("cached"), summary.count("failed")) == (4, 2)
    started = {event.cell for event in again if isinstance(event, Started)}
    assert started == {failure.cell for failure in summary.failures}
    assert cached_results(plan, store).keys() == {cell.key for cell in good.cells}
    # With nothing left to run, nothing is started.
    events.clear()
    assert run_plan(good, store, kind.make(2), events.append).count("cached") == 4
    assert not [event for event in events if isinstance(event, Started)]
    assert {event_document(event)["event"] for event in events} == {"finished"}


def check_results(two_models, store, summary):
    """The store holds what wb.run makes by hand, and nothing else."""
    about = {"n_pos": 16, "limit": 2}
    by_hand = wb.run("attention-sinks", two_models[0], "builtin:natural", store=store, **about)
    assert by_hand.cached
    model = wb.load(two_models[1])
    with model.edit(EDIT):
        edited = wb.run("attention-sinks", model, "builtin:natural", **about)
    assert {by_hand.key, edited.key} <= {one.result for one in summary.outcomes}
    np.testing.assert_array_equal(store.get(edited.key).arrays["score"], edited.arrays["score"])
    assert len(store.list()) == 4
    assert store.verify().damaged == {}


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_fails_and_the_rest_are_kept(kind, two_models, store):
    plan = sinks(two_models)
    first = []

    def watch(event):
        if isinstance(event, Started):
            first.append(event.cell)
            if event.cell == first[0]:
                os.kill(kind.process(event), signal.SIGKILL)

    summary = run_plan(plan, store, kind.make(1), watch)
    assert first == [plan.cells[0].key] * 2 + [plan.cells[1].key]
    (failure,) = summary.failures
    assert failure.cell == plan.cells[0].key
    assert "died twice" in failure.error
    assert summary.count("computed") == 1


@pytest.mark.slow  # the sweep command's own test does the same to local workers
def test_an_interrupt_stops_within_two_seconds_and_keeps_what_is_done(kind, two_models, store):
    plan = sinks(two_models[:1], seeds=list(range(30)))
    seen, raised = [], []

    def watch(event):
        seen.append(event)
        if sum(isinstance(one, Outcome) for one in seen) == 2:
            raised.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, store, kind.make(1), watch)
    assert time.monotonic() - raised[0] < 2
    processes = {kind.process(event) for event in seen if isinstance(event, Started)}
    kept = len(store.list())
    assert 2 <= kept < 30
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in processes)
    assert store.verify().damaged == {}
    # It goes on with more workers, and does nothing twice.
    n_kept = len(store.list())
    summary = run_plan(plan, store, kind.make(2))
    assert (summary.count("cached"), summary.count("computed")) == (n_kept, 30 - n_kept)
    assert len(store.list()) == 30


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
        return state != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_cell_tells_how_far_it_is(kind, two_models, store, monkeypatch):
    if kind is Ray:
        monkeypatch.setattr("workbench.execute.ray.ASK_SECONDS", 0.02)
    text = [f"one prompt more, the {number}th of them" for number in range(300)]
    plan = sinks(two_models[:1], data=[text], limit=300, batch_size=1)
    events, scores = [], []

    def watch(event):
        events.append(event)
        if isinstance(event, Started):
            scores.append(Path(f"/proc/{kind.process(event)}/oom_score_adj").read_text())

    run_plan(plan, store, kind.make(1), watch)
    # When memory runs out, the system is to end a worker rather than the sweep.
    assert kind is not Local or [int(score) for score in scores] == [500]
    advanced = [event for event in events if isinstance(event, Advanced)]
    assert {(event.cell, event.total) for event in advanced} == {(plan.cells[0].key, 300)}
    assert [event.done for event in advanced] == sorted(event.done for event in advanced)
