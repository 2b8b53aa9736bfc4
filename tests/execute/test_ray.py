"""The ray executor, on a cluster of two nodes of this machine, one of which is killed."""

import os
import socket

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.protocol import Lost, Started
from workbench.execute.sweep import run_plan


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, about its sockets and its defaults
def test_a_node_that_dies_costs_its_cells_one_try(cluster, two_models, store):
    from workbench.execute.ray import RayExecutor

    plan = sinks(two_models, seeds=[0, 1, 2])
    executor = RayExecutor()
    assert executor.n_workers == 2
    events, gone = [], []

    def watch(event):
        events.append(event)
        # Its actor has a cell now; the second node goes.
        if isinstance(event, Started) and event.worker == "actor-2" and not gone:
            gone.append(True)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    summary = run_plan(plan, store, executor, watch)
    assert summary.count("computed") == 6
    assert len({one.result for one in summary.outcomes}) == 6
    assert len([event for event in events if isinstance(event, Lost)]) == 1
    # One node is left: the same plan goes on with one worker.
    assert run_plan(plan, store, RayExecutor(1)).count("cached") == 6
    assert store.verify().damaged == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_tells_where_actors_are_and_what_nodes_have(cluster, two_models, store):
    from workbench.execute.ray import RayExecutor

    executor = RayExecutor(1)
    events = []
    plan = sinks(two_models[:1])
    run_plan(plan, store, executor, events.append)
    started = next(event for event in events if isinstance(event, Started))
    host, _, pid = started.host.split()
    assert host == socket.gethostname()
    assert int(pid) != os.getpid()
    room = executor.room(plan.cells)
    assert (room.n_workers, room.n_places) == (1, 2)
    assert room.free_bytes > 10**8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_without_cores_is_refused(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from workbench.execute.ray import RayExecutor

    ray.init(
        address="local",
        num_cpus=0,
        log_to_driver=False,
        logging_level="ERROR",
        include_dashboard=False,
    )
    try:
        with pytest.raises(ConfigError, match="a core for each worker"):
            RayExecutor()
    finally:
        ray.shutdown()


def test_without_ray_the_refusal_says_what_to_install(monkeypatch):
    import sys

    from workbench.execute.ray import RayExecutor

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"\[ray\]'?, or use --executor local"):
        RayExecutor()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_without_a_cluster_the_refusal_says_how_to_start_one(monkeypatch):
    pytest.importorskip("ray")
    from workbench.execute.ray import RayExecutor

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="ray start --head"):
        RayExecutor()
