"""The sweep as a toy task: panels one after another, kept, gone on with, and stored."""

from dataclasses import replace

import pytest
import torch

from toy_tasks.scan_snap_data import SYN_MEDIUM
from toy_tasks.scan_snap_panels import ScanSnapSweepConfig, train_scan_snap_sweep
from toy_tasks.scan_snap_sweep import sweep_scan_snap
from toy_tasks.training import TrainingError, read_metrics
from workbench.discovery import find_probe
from workbench.errors import ConfigError
from workbench.provenance import content_key
from workbench.result import Result
from workbench.settings import make_config

FEW = ScanSnapSweepConfig(
    n_queries=(1, 2),
    lr_z=(0.5, 3.0),
    lr_ratio=(1.0, 2.0, 10.0),
    n_seeds=2,
    seed=4,
    steps=8,
    batch_size=8,
    n_pos=16,
)


def test_panels_are_those_of_the_batched_sweep(tmp_path):
    found = train_scan_snap_sweep(FEW, tmp_path)
    assert found.entropy.shape == (2, 2, 3, 2)
    for index, n_queries in enumerate((1, 2)):
        config = replace(SYN_MEDIUM, n_queries=n_queries, steps=8, batch_size=8, n_pos=16)
        panel = sweep_scan_snap(config, (4, 5), lr_z=FEW.lr_z, lr_ratios=FEW.lr_ratio)
        assert torch.equal(found.entropy[index], panel.entropy)
        assert torch.equal(found.loss[index], panel.loss)
    assert found.labels["panel"] == ("n_queries=1", "n_queries=2")
    assert found.metrics()["n_runs"] == 24
    table = found.table()
    assert table["n_queries"] == [1] * 6 + [2] * 6
    assert table["entropy"] == pytest.approx(found.entropy.mean(dim=-1).flatten().tolist())


def test_the_defaults_are_the_papers_larger_set():
    config = ScanSnapSweepConfig()
    assert config.panel(1) == SYN_MEDIUM
    assert (config.lr_z, config.lr_ratio) == ((0.5, 1.0, 2.0, 3.0), (1.0, 2.0, 5.0, 10.0))
    assert (config.n_queries, len(config.seeds)) == ((1, 3, 5, 10), 10)


def test_a_stopped_sweep_goes_on_with_the_next_panel(tmp_path):
    whole = train_scan_snap_sweep(FEW, tmp_path / "whole")

    def crash(progress):
        if progress.step == 9:
            raise MemoryError

    with pytest.raises(MemoryError):
        train_scan_snap_sweep(FEW, tmp_path / "cut", crash)
    assert (tmp_path / "cut" / "panel_001.safetensors").exists()
    assert not (tmp_path / "cut" / "panel_002.safetensors").exists()
    seen = []
    again = train_scan_snap_sweep(FEW, tmp_path / "cut", seen.append)
    assert {one.step for one in seen} == set(range(9, 17))
    assert torch.equal(again.entropy, whole.entropy)
    assert [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [1, 2]
    with pytest.raises(TrainingError, match="steps=8, not 9"):
        train_scan_snap_sweep(replace(FEW, steps=9), tmp_path / "cut")


def test_progress_counts_all_panels_and_the_time_left(tmp_path):
    seen = []
    train_scan_snap_sweep(FEW, tmp_path, seen.append)
    assert [one.step for one in seen] == list(range(1, 17))
    assert {one.n_steps for one in seen} == {16}
    assert seen[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert seen[0].seconds_left > 0


def test_a_run_that_diverges_is_marked_and_the_orderings_leave_it_out(tmp_path):
    config = replace(FEW, lr_z=(0.5, 1e30), n_queries=(1,), steps=40)
    found = train_scan_snap_sweep(config, tmp_path)
    assert found.metrics()["n_diverged"] > 0
    assert (found.diverged_at[0, 0] == -1).all()
    assert found.mean_entropy()[0, 0].isfinite().all()


def test_it_is_a_result_like_any_other(tmp_path):
    task = find_probe("scan-snap-sweep")
    measured = train_scan_snap_sweep(FEW, tmp_path)
    result = Result.from_measurement(task, measured, key=content_key({}), provenance={})
    assert result.measured.config == FEW
    assert result.measured.metrics() == measured.metrics()
    assert result.labels["lr_z"] == ["0.5", "3"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr_z", "", "lr_z must be distinct numbers, at least one"),
        ("lr_z", "1,1", "lr_z must be distinct"),
        ("lr_z", "1,0", "lr_z must be above 0"),
        ("lr_ratio", "1,2,3,4,5,-2", "lr_ratio must be above 0"),
        ("n_queries", "0", "n_queries must be at least 1"),
        ("n_seeds", "0", "n_seeds must be between"),
        ("steps", "0", "steps must be at least 1"),
        ("lr_z", "fast", "lr_z must be a number"),
    ],
)
def test_impossible_settings_are_refused(name, value, words):
    with pytest.raises(ConfigError, match=words):
        make_config(ScanSnapSweepConfig, {name: value}, "scan-snap-sweep")
