"""One suite for all executors: every cell ends once, a death costs one cell, results are run's."""

import os
import signal

import numpy as np
import pytest

import workbench as wb
from tests.execute.conftest import sinks
from workbench.execute.cell import Outcome
from workbench.execute.protocol import Executor, Lost, Started, event_document
from workbench.execute.sweep import cached_results, run_plan

EXECUTORS = ["local", pytest.param("slurm", marks=pytest.mark.slow)]


def make(name, n_workers):
    if name == "local":
        from workbench.execute.local import LocalExecutor

        return LocalExecutor(n_workers)
    from workbench.execute.slurm import SlurmExecutor

    return SlurmExecutor(n_workers, {"timeout_min": "5"}, cluster="local")


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_keeps_the_protocol(name, two_models, store):
    """A kill in the middle, a cell that fails, and a second run that goes on with more workers."""
    edit = {"name": "zerotuning", "gamma": 2.0}
    good = sinks(two_models, interventions=["none", edit])
    # Layer 9 is not there: the cell fails, and is no reason to try it again.
    bad = {"name": "zero-heads", "heads": [[9, 0]]}
    plan = sinks(two_models, interventions=["none", edit, bad])
    executor = make(name, 1)
    assert isinstance(executor, Executor)
    events, killed = [], []

    def watch(event):
        events.append(event)
        if isinstance(event, Started) and not killed:
            killed.append(int(event.worker))
            os.kill(killed[0], signal.SIGKILL)

    summary = run_plan(plan, store, executor, watch)
    kinds = [event_document(event)["event"] for event in events]
    assert [kind for kind in kinds if kind == "lost"] == ["lost"]
    lost = next(event for event in events if isinstance(event, Lost))
    assert lost.cell == events[0].cell
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
    # The store holds what wb.run makes by hand, and nothing else.
    by_hand = wb.run(
        "attention-sinks", two_models[0], "builtin:natural", n_pos=16, limit=2, store=store
    )
    assert by_hand.cached
    model = wb.load(two_models[1])
    with model.edit(edit):
        edited = wb.run("attention-sinks", model, "builtin:natural", n_pos=16, limit=2)
    kept = {one.result: one for one in summary.outcomes}
    assert {by_hand.key, edited.key} <= set(kept)
    np.testing.assert_array_equal(store.get(edited.key).arrays["score"], edited.arrays["score"])
    assert len(store.list()) == 4
    assert store.verify().damaged == {}
    # The same plan again: only what failed runs, on more workers.
    again = []
    summary = run_plan(plan, store, make(name, 2), again.append)
    assert (summary.count("cached"), summary.count("failed")) == (4, 2)
    started = {event.cell for event in again if isinstance(event, Started)}
    assert started == {failure.cell for failure in summary.failures}
    assert cached_results(plan, store).keys() == {cell.key for cell in good.cells}
    # With nothing left to run, nothing is started.
    events.clear()
    assert run_plan(good, store, make(name, 2), events.append).count("cached") == 4
    assert not [event for event in events if isinstance(event, Started)]


def test_a_cell_that_kills_every_worker_fails_and_the_rest_are_kept(two_models, store):
    plan = sinks(two_models)
    first = []

    def watch(event):
        if isinstance(event, Started):
            first.append(event.cell)
            if event.cell == first[0]:
                os.kill(int(event.worker), signal.SIGKILL)

    summary = run_plan(plan, store, make("local", 1), watch)
    assert first == [plan.cells[0].key] * 2 + [plan.cells[1].key]
    (failure,) = summary.failures
    assert failure.cell == plan.cells[0].key
    assert "died twice" in failure.error
    assert "SIGKILL" in failure.error
    assert summary.count("computed") == 1
