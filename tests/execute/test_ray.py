"""The ray executor, on a cluster of two nodes of this machine, one of which is killed."""

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.cell import Outcome
from workbench.execute.protocol import Executor, Lost, Started
from workbench.execute.sweep import run_plan


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with one core each."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    import ray

    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, about its sockets and its defaults
def test_a_node_that_dies_costs_its_cells_one_try(cluster, two_models, store):
    from workbench.execute.ray import RayExecutor

    bad = {"name": "zero-heads", "heads": [[9, 0]]}
    plan = sinks(two_models, seeds=[0, 1, 2], interventions=["none"])
    failing = sinks(two_models[:1], interventions=[bad])
    executor = RayExecutor()
    assert isinstance(executor, Executor)
    assert executor.n_workers == 2
    events = []

    def watch(event):
        events.append(event)
        # Both actors have a cell by now; the second node goes.
        if isinstance(event, Started) and len(events) == 2:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    summary = run_plan(plan, store, executor, watch)
    assert summary.count("computed") == 6
    assert len({one.result for one in summary.outcomes}) == 6
    assert len([event for event in events if isinstance(event, Lost)]) == 1
    # One node is left: the same plan goes on with one worker, and a failed cell is told.
    assert run_plan(plan, store, RayExecutor(1)).count("cached") == 6
    (failure,) = run_plan(failing, store, RayExecutor(1)).failures
    assert "layer" in failure.error
    assert all(isinstance(one, Outcome) for one in summary.outcomes)
    assert store.verify().damaged == {}


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
