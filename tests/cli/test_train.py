"""``workbench train``: settings in, a folder out."""

import json

import pytest

from workbench.cli import train


@pytest.fixture
def echo_toy(monkeypatch):
    """A toy that writes down what it was told."""

    def write(settings, folder):
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(settings))
        return folder

    monkeypatch.setitem(train.TOYS, "echo", train.Toy("says what it was told", write))


@pytest.mark.usefixtures("echo_toy")
def test_settings_reach_the_toy_and_the_folder_is_the_result(command, tmp_path):
    done = command("train", "echo", "--set", "lr=0.1", "--set", "n-steps=3", "-o", tmp_path / "out")
    assert done.out == f"{tmp_path / 'out'}\n"
    assert "next: workbench run" in done.err
    told = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert told == {"lr": "0.1", "n_steps": "3"}


@pytest.mark.usefixtures("echo_toy")
def test_json_is_one_object(command, tmp_path):
    done = command("train", "echo", "-o", tmp_path / "out", "--json")
    assert done.json == {"toy": "echo", "path": str(tmp_path / "out")}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("n_layer=2", "Did you mean 'n_layers'?"),
        ("lr=fast", "lr must be a number"),
        ("lr=0", "above 0"),
    ],
)
def test_wrong_settings_are_refused_before_training(command, tmp_path, setting, words):
    failed = command(
        "train", "language-model", "--set", f"text={tmp_path}", "--set", setting,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert failed.failed_with(words)
    assert not (tmp_path / "out").exists()


def test_a_sink_is_told_what_the_terminal_is_told(command, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from toy_tasks import training_sinks
    from toy_tasks.training import Progress

    told, opened = [], []

    @contextmanager
    def open_sink(name, task, folder, settings):
        opened.append((name, task, folder, settings))
        yield told.append

    def write(settings, folder, progress):
        progress(Progress(1, 2, {"step": 1, "loss": 0.5}, 3.0))
        return folder

    monkeypatch.setattr(training_sinks, "open_sink", open_sink)
    monkeypatch.setitem(train.TOYS, "echo", train.Toy("tells once", write))
    out = tmp_path / "out"
    done = command("train", "echo", "--set", "lr=1", "-o", out, "--sink", "wandb")
    assert done.code == 0
    assert opened == [("wandb", "echo", out, {"lr": "1"})]
    assert [progress.figures["loss"] for progress in told] == [0.5]
    assert "step 1/2  loss 0.5" in done.err
