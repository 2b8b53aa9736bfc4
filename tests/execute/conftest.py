"""Two tiny models side by side, plans of a few cells on them, and a Ray cluster."""

import shutil

import pytest

from workbench.execute.plan import make_plan
from workbench.store.results import Store


@pytest.fixture(scope="session")
def two_models(tiny_folder, tmp_path_factory):
    """Two folders of models with different weights."""
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    name = "transformer.wpe.weight"
    weights[name] = weights[name] + torch.linspace(0, 1, weights[name].shape[1])
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return [str(tiny_folder), str(other)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", report=lambda message: None)


def sinks(models, /, **changes):
    """A plan of one cheap probe."""
    plan = {
        "models": list(models),
        "probes": {"attention-sinks": {}},
        "data": "builtin:natural",
        "n_pos": 16,
        "limit": 2,
    }
    return make_plan({**plan, **changes})


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes with one core each, on this machine."""
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
