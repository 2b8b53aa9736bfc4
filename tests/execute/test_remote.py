"""The nnsight executor without a key refuses; with a stand-in for a hosted model it keeps order."""

import pytest

from tests.execute.conftest import sinks
from workbench.errors import ConfigError
from workbench.execute.protocol import Executor, Started
from workbench.execute.remote import RemoteExecutor
from workbench.execute.sweep import run_plan


@pytest.fixture
def key(monkeypatch):
    nnsight = pytest.importorskip("nnsight")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")


def test_without_a_key_the_refusal_says_where_to_get_one(monkeypatch):
    nnsight = pytest.importorskip("nnsight")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(ConfigError, match=r"NDIF_API_KEY .*; for models on this machine"):
        RemoteExecutor()


@pytest.mark.usefixtures("key")
def test_there_is_one_queue():
    with pytest.raises(ConfigError, match="one queue; got 3 workers"):
        RemoteExecutor(3)


@pytest.mark.usefixtures("key")
def test_cells_run_one_after_another_on_the_model_that_is_pointed_at(
    two_models, store, monkeypatch
):
    """Here the model that is pointed at is a local one: nothing reaches NDIF."""
    from workbench.models import nnsight_building
    from workbench.models.load import load

    pointed = []
    monkeypatch.setattr(
        nnsight_building,
        "load_remote",
        lambda name, revision: pointed.append((name, revision)) or load(name, "nnsight"),
    )
    executor = RemoteExecutor()
    assert isinstance(executor, Executor)
    events = []
    plan = sinks(two_models, seeds=[0, 1], backends="nnsight")
    summary = run_plan(plan, store, executor, events.append)
    assert summary.count("computed") == 4
    assert pointed == [(name, None) for name in sorted(two_models)]
    assert {event.worker for event in events if isinstance(event, Started)} == {"NDIF"}


@pytest.mark.usefixtures("key")
def test_cells_of_another_backend_are_refused(two_models, store):
    with pytest.raises(ConfigError, match="write backends: nnsight"):
        run_plan(sinks(two_models), store, RemoteExecutor())
