"""Shares of a job array, refusals, and a job that is sent back to the queue."""

import os
import signal
import sys

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.cell import Cell, Outcome
from workbench.execute.estimate import Room
from workbench.execute.protocol import Started
from workbench.execute.slurm import SlurmExecutor, share_out
from workbench.execute.sweep import run_plan


def cells_of(**counts):
    return [
        Cell(f"{model}{number}", "attention-sinks", model, None, {}, {})
        for number in range(max(counts.values()))
        for model, count in counts.items()
        if number < count
    ]


def keys(shares):
    return [[cell.key for cell in share] for share in shares]


def test_shares_keep_models_together_and_sizes_equal():
    cells = cells_of(a=2, b=3)
    assert keys(share_out(cells, 1)) == [["a0", "a1", "b0", "b1", "b2"]]
    assert keys(share_out(cells, 2)) == [["a0", "a1"], ["b0", "b1", "b2"]]
    assert keys(share_out(cells, 9)) == [["a0"], ["a1"], ["b0"], ["b1"], ["b2"]]


def test_without_submitit_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"\[slurm\]'?, or use --executor local"):
        SlurmExecutor()


def test_without_slurm_the_refusal_says_where_it_must_run(two_models, store, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="must run where sbatch is"):
        run_plan(sinks(two_models[:1]), store, SlurmExecutor())


def test_a_parameter_that_does_not_exist_is_one_line(two_models, store):
    pytest.importorskip("submitit")
    executor = SlurmExecutor(1, {"timeout_min": "soon"}, cluster="local")
    with pytest.raises(ConfigError, match="parameters it knows"):
        run_plan(sinks(two_models[:1]), store, executor)


def test_room_is_what_a_job_asks_for():
    pytest.importorskip("submitit")
    assert SlurmExecutor(9, {"mem_gb": "2"}).room([]) == Room(2 << 30)
    assert SlurmExecutor(9, {"mem_gb": "2", "gpus_per_node": "1"}).room([]) is None
    assert SlurmExecutor(9).room([]) is None
    with pytest.raises(ConfigError, match="mem_gb must be a number; got 'much'"):
        SlurmExecutor(9, {"mem_gb": "much"}).room([])


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_from_the_queue(two_models, store, monkeypatch):
    """The signal is the one that Slurm sends before it takes a job's machine away."""
    submitit = pytest.importorskip("submitit")
    jobs, interrupted = [], []
    submit = submitit.AutoExecutor.submit
    monkeypatch.setattr(
        submitit.AutoExecutor,
        "submit",
        lambda self, *work: jobs.append(submit(self, *work)) or jobs[-1],
    )
    starts = []

    def watch(event):
        starts.extend([event] if isinstance(event, Started) else [])
        if isinstance(event, Outcome) and not interrupted:
            interrupted.append(True)
            os.kill(int(starts[-1].worker), signal.SIGUSR2)

    plan = sinks(two_models, seeds=list(range(10)))
    executor = SlurmExecutor(1, {"timeout_min": "5"}, cluster="local")
    summary = run_plan(plan, store, executor, watch)
    assert len(jobs) == 1
    # The job was put back into the queue and told its first cell again.
    assert [event.cell for event in starts].count(starts[0].cell) == 2
    assert len({event.worker for event in starts}) == 2
    assert summary.count("computed") + summary.count("cached") == 20
    assert len(store.list()) == 20
    assert os.listdir(store.path / "temp") == []  # noqa: PTH208
