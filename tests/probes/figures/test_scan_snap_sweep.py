"""The sweep's figures show its means, on one scale, with holes where every run diverged."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures.scan_snap_sweep import figures, finding
from toy_tasks.scan_snap_panels import ScanSnapSweepConfig, ScanSnapSweepResult
from workbench.discovery import find_figures, find_probe


@pytest.fixture
def result():
    config = ScanSnapSweepConfig(
        n_queries=(1, 3), lr_z=(0.5, 2.0), lr_ratio=(1.0, 2.0, 5.0), n_seeds=2
    )
    entropy = torch.arange(24, dtype=torch.float32).view(2, 2, 3, 2) / 24
    entropy[1, 1, 2] = torch.nan
    diverged = torch.where(entropy.isnan(), 7, -1)
    return ScanSnapSweepResult(entropy, entropy / 2, entropy / 3, diverged, {}, config)


def test_they_are_found_like_those_of_a_probe():
    assert find_figures(find_probe("scan-snap-sweep")) is figures


def test_cells_are_the_means_on_one_scale(result):
    drawn = figures(result)
    assert set(drawn) == {"entropy", "common_mass"}
    for panel, mean in zip(drawn["entropy"].data, result.mean_entropy(), strict=True):
        np.testing.assert_array_equal(panel.z, mean)
        assert panel.x == ("1", "2", "5")
        assert panel.y == ("0.5", "2")
        assert (panel.zmin, panel.zmax) == (pytest.approx(0.5 / 24), pytest.approx(20.5 / 24))
        # Two seeds, 1/24 apart: the standard error is half of that.
        assert np.nanmax(panel.customdata) == pytest.approx(0.5 / 24)
    assert np.isnan(drawn["entropy"].data[1].z[1, 2])
    np.testing.assert_allclose(drawn["common_mass"].data[0].z[0], [0.25 / 24, 1.25 / 24, 2.25 / 24])


def test_n_units_and_headings_are_stated(result):
    for figure in figures(result).values():
        assert "n = 2 runs a cell (seeds 0 to 1) of 100 steps" in figure.layout.title.subtitle.text
        assert [note.text for note in figure.layout.annotations[:2]] == ["1 query", "3 queries"]
        assert next(figure.select_yaxes()).title.text == "eta_Z (rate)"


def test_the_finding_counts_what_holds_and_what_diverged(result):
    said = finding(result)
    # The planted entropies rise everywhere, but for one comparison with a hole.
    assert "falls with lr_z in 0%" in said
    assert "in 75%" in said
    assert "(24 runs; 2 diverged)" in said
    calm = dataclasses.replace(result, diverged_at=torch.full((2, 2, 3, 2), -1))
    assert "diverged" not in finding(calm)
