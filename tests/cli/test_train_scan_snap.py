"""``workbench train scan-snap``: a record in the store, a model in the folder, errors in a line."""

import json
import re

import pytest

import workbench as wb
from toy_tasks.training import read_metrics

SMALL = ("--set", "steps=12", "--set", "batch_size=8", "--set", "n_pos=16")


def test_the_record_goes_to_the_store_with_the_model(command, store_path, tmp_path):
    done = command("train", "scan-snap", *SMALL, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    result = wb.Store(store_path).get(done.json["key"])
    assert (result.probe, result.model) == ("scan-snap", "scan-snap")
    assert result.config["batch_size"] == 8
    assert result.z.shape == (13, 2, 34)
    assert done.json["metrics"] == result.metrics()
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        assert (result.path / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((result.path / "config.json").read_text("utf-8"))["steps"] == 12


def test_the_same_settings_are_the_same_result(command, tmp_path):
    first = command("train", "scan-snap", *SMALL, "-o", tmp_path / "a", "--json")
    again = command("train", "scan-snap", *SMALL, "-o", tmp_path / "b", "--json")
    other = command("train", "scan-snap", *SMALL, "--set", "seed=3", "-o", tmp_path / "c", "--json")
    assert first.json["key"] == again.json["key"] != other.json["key"]
    assert first.json["metrics"] == again.json["metrics"] != other.json["metrics"]


def test_progress_goes_to_stderr_and_the_folder_to_stdout(command, tmp_path):
    done = command("train", "scan-snap", *SMALL, "-o", tmp_path / "out")
    assert done.out.splitlines()[0] == str(tmp_path / "out")
    assert "step 6/12  loss" in done.err
    assert "next: workbench results show" in done.err
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 13


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps=0", "steps must be"),
        ("n_distinct=0", "n_distinct must be at least 1"),
        ("n_distinct=99999", "at most 10000 tokens"),
        ("lr_x=1", "Did you mean 'lr_z'?"),
        ("init=ones", "zero, normal, uniform"),
    ],
)
def test_bad_settings_are_refused_in_one_line_before_a_folder_is_made(
    command, tmp_path, setting, words
):
    failed = command("train", "scan-snap", "--set", setting, "-o", tmp_path / "out")
    assert failed.failed_with(words)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_folder(command, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    failed = command("train", "scan-snap", "-o", tmp_path / "file")
    assert failed.failed_with("-o must be a folder that can be made")


def test_rates_that_diverge_are_reported_with_the_step(command, tmp_path):
    failed = command(
        "train", "scan-snap", "--set", "lr_z=1e8", "--set", "seed=0", "-o", tmp_path / "out"
    )
    assert failed.code == 1
    assert failed.out == ""
    assert re.search(r"at step \d+ it is", failed.err.splitlines()[-1])
    assert (tmp_path / "out" / "metrics.jsonl").is_file()


def test_a_sweep_is_stored_and_drawn(command, store_path, tmp_path):
    words = ("n_queries=1,2", "lr_z=0.5,3", "lr_ratio=1,10", "n_seeds=2", "steps=8", "n_pos=16")
    given = [word for setting in words for word in ("--set", setting)]
    done = command("train", "scan-snap-sweep", *given, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    result = wb.Store(store_path).get(done.json["key"])
    assert result.entropy.shape == (2, 2, 2, 2)
    assert done.json["metrics"]["n_runs"] == 16
    assert set(result.figures()) == {"entropy", "common_mass"}
    failed = command("train", "scan-snap-sweep", "--set", "n_seeds=0", "-o", tmp_path / "bad")
    assert failed.failed_with("n_seeds must be between 1 and 1000")
