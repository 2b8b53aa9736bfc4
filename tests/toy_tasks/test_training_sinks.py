"""Figures of a run in TensorBoard and Weights & Biases: read back from the files they wrote."""

import sys

import pytest

from toy_tasks.training import Progress
from toy_tasks.training_sinks import numbers, open_sink
from workbench.errors import ConfigError, UnknownNameError


def told(tell):
    for step in (0, 10, 20):
        tell(Progress(step, 20, {"step": step, "loss": 2.0 - step / 10, "bad": float("nan")}, 1.0))


@pytest.mark.filterwarnings("ignore")  # TensorBoard's protocol buffers
def test_tensorboard_holds_every_figure_at_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    with open_sink("tensorboard", "bigram-backcopy", tmp_path, {}) as tell:
        told(tell)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss"]
    points = [(point.step, point.value) for point in found.Scalars("loss")]
    assert points == [(0, 2.0), (10, 1.0), (20, 0.0)]


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_is_told_the_same_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    with open_sink("wandb", "bigram-backcopy", tmp_path, {"lr": "0.1"}) as tell:
        assert wandb.run.config["lr"] == "0.1"
        assert wandb.run.project == "workbench-bigram-backcopy"
        log = type(wandb.run).log
        monkeypatch.setattr(
            type(wandb.run),
            "log",
            lambda self, data, step: logged.append((step, data)) or log(self, data, step=step),
        )
        told(tell)
    assert logged == [(0, {"loss": 2.0}), (10, {"loss": 1.0}), (20, {"loss": 0.0})]
    assert [path.suffix for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [".wandb"]


def test_only_finite_numbers_are_sent():
    figures = {"step": 3, "loss": 0.5, "bad": float("inf")}
    assert numbers(Progress(3, 9, figures, 0.0)) == {"loss": 0.5}


@pytest.mark.parametrize(
    ("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_library_that_is_missing_is_one_line(tmp_path, monkeypatch, sink, module):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ConfigError, match=rf"needs {sink}, which is not installed"),
        open_sink(sink, "scan-snap", tmp_path, {}),
    ):
        pass


def test_a_sink_that_does_not_exist_is_offered_the_nearest(tmp_path):
    with (
        pytest.raises(UnknownNameError, match="Did you mean 'tensorboard'"),
        open_sink("tensorbord", "scan-snap", tmp_path, {}),
    ):
        pass
