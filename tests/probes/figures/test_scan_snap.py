"""Figures of the scan-snap toy: what is drawn is what was recorded, beside what theory says."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures.scan_snap import (
    figure_attention,
    figure_common_tokens,
    figure_distinct_tokens,
    figure_scan_and_snap,
    figures,
    finding,
    flow_through_end,
)
from toy_tasks.scan_snap import ScanSnapConfig, train_scan_snap
from workbench.discovery import find_figures, find_probe


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config = ScanSnapConfig(steps=60, n_queries=2, n_classes_per_query=2, batch_size=32)
    return train_scan_snap(config, tmp_path_factory.mktemp("run"))


def test_they_are_found_like_those_of_a_probe():
    assert find_figures(find_probe("scan-snap")) is figures


def test_every_figure_states_n_a_definition_and_units(result):
    for figure in figures(result).values():
        stated = figure.layout.title.subtitle.text
        assert "n = 1 run (seed 2) of 60 steps of 32 sequences of 128 tokens" in stated
        assert len(stated) > 150
        titles = [axis.title.text for axis in figure.select_xaxes()]
        titles += [next(figure.select_yaxes()).title.text]
        assert all(title and "(" in title for title in titles), titles


def test_the_snap_is_marked_only_where_there_is_one(result):
    frozen = dataclasses.replace(result, snap_step=torch.tensor(31))
    marks = figure_scan_and_snap(frozen).layout.shapes
    assert [mark.x0 for mark in marks] == [31, 31, 31]
    moving = dataclasses.replace(result, snap_step=torch.tensor(-1))
    assert not figure_scan_and_snap(moving).layout.shapes
    assert "froze at step 31" in finding(frozen)
    assert "had not frozen" in finding(moving)


def test_lines_are_the_record(result):
    lines = figure_scan_and_snap(result).data
    for line, values in zip(
        lines, (result.loss, result.common_mass(), result.entropy), strict=True
    ):
        np.testing.assert_array_equal(line.x, result.step)
        np.testing.assert_array_equal(line.y, values)


def test_attention_has_a_row_a_token_of_the_class(result):
    (heatmap,) = figure_attention(result, row=3).data
    assert list(heatmap.y[:2]) == ["common 0", "common 1"]
    assert list(heatmap.y[-1:]) == ["distinct 49"]
    np.testing.assert_array_equal(heatmap.z[-1], result.attention[:, 3, 49])


def test_theory_of_distinct_tokens_goes_through_the_most_frequent(result):
    traces = figure_distinct_tokens(result).data
    for points, curve in zip(traces[::2], traces[1::2], strict=True):
        assert curve.name == f"{points.name}, theory"
        assert curve.y[-1] == pytest.approx(points.y[-1], abs=1e-6)
        assert curve.y[0] == 0
    assert traces[-1].name == "step 60, theory"
    # Of 61 checkpoints: 8, 16, 32 and 100 % of the way.
    assert [points.name for points in traces[::2]] == [f"step {at}" for at in (5, 10, 19, 60)]
    last = result.class_z()[-1, :, [19, 29, 39, 49]].diagonal().mean().item()
    assert traces[-2].y[-1] == pytest.approx(last, rel=1e-6)


def test_the_flow_begins_at_zero_and_meets_the_last_point(result):
    flow = flow_through_end(result, 0.7)
    assert flow[0] == 0
    assert flow[-1] == pytest.approx(0.7, abs=1e-3)
    assert (np.diff(flow) > 0).all()
    measured, theory = figure_common_tokens(result).data
    common = result.class_z()[-1, :, :10].mean().item()
    assert measured.y[-1] == pytest.approx(-common, rel=1e-5)
    assert theory.y[-1] == pytest.approx(measured.y[-1], abs=1e-3)


def test_a_run_without_common_tokens_and_a_very_short_one_can_be_drawn(tmp_path):
    config = ScanSnapConfig(steps=3, n_common=0, batch_size=4)
    assert "common_tokens" not in figures(train_scan_snap(config, tmp_path / "a"))
    few = train_scan_snap(dataclasses.replace(config, n_common=2), tmp_path / "b")
    measured = figure_common_tokens(few).data[0]
    assert list(measured.x) == [1, 2, 3]  # the axis is logarithmic
    np.testing.assert_allclose(measured.y, -few.class_z()[1:, :, :2].mean(dim=(1, 2)), atol=1e-6)
    short = train_scan_snap(dataclasses.replace(config, n_common=2, steps=1), tmp_path / "c")
    assert "attention" in figures(short)


def test_long_runs_make_small_figures(tmp_path):
    config = ScanSnapConfig(steps=1000, batch_size=2, n_pos=8)
    for figure in figures(train_scan_snap(config, tmp_path)).values():
        assert len(figure.to_json()) < 60_000
