"""Figures of information flow: they show the result's numbers and say what they are."""

import numpy as np
import pytest
import torch

import workbench as wb
from probes.figures.information_flow import figures, finding, mean_over_pairs
from tests.probes.planted_flow import copying_toy, rows_of

ROWS = rows_of(
    ([1, 5, 2, 6, 3], [[5], [6]]),
    ([1, 7, 2, 8, 3], [[7], [8]]),
    ([1, 9, 10, 11, 3], [[9, 10], [11]]),
)


@pytest.fixture(scope="module")
def result():
    model = copying_toy({3: 1}, gain=4.0 / 3.0)
    options = {"knockout": True, "routes": True, "common": "left-in", "layer": 2}
    return wb.run("information-flow", model, ROWS, **options).measured


def test_there_is_one_of_each_and_all_say_n(result):
    drawn = figures(result)
    assert set(drawn) == {
        "token_scores",
        "keep_sets",
        "flow",
        "leakage",
        "flow_by_layer",
        "direct",
        "routes",
    }
    for name, figure in drawn.items():
        assert "n = " in figure.layout.title.subtitle.text, name
        assert figure.layout.title.text, name
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            assert axis.title.text, name


def test_the_flow_matrix_is_the_mean_over_prompts_that_have_both(result):
    found = figures(result)["flow"].data[0].z
    expected = result.flow[:, 1, 0].mean().item()
    assert found[1][0] == pytest.approx(expected, rel=1e-5)
    assert found[0][1] == 0.0
    assert np.isnan(found[0][0])
    assert mean_over_pairs(result.leak_score, result)[1, 0] == pytest.approx(
        result.leak_score[:, 1, 0].mean().item()
    )


def test_every_item_token_is_one_mark(result):
    carrying, redundant = figures(result)["token_scores"].data
    assert len(carrying.x) == int(result.representative.sum())
    assert len(carrying.x) + len(redundant.x) == int((result.item_of_pos >= 0).sum()) == 7
    assert max([*carrying.x, *redundant.x]) == 1


def test_the_layer_bars_are_the_means(result):
    bars = figures(result)["flow_by_layer"].data[0].y
    torch.testing.assert_close(torch.as_tensor(np.array(bars)), result.flow_by_layer.mean(dim=0))


def test_the_finding_names_the_leak_and_its_repair(result):
    said = finding(result)
    assert "50% of items read as another, 0% with their own representation" in said
    assert "n = 6 items in 3 prompts" in said


def test_extras_and_pairs_that_were_not_measured_are_not_drawn():
    model = copying_toy({})
    one = rows_of(([1, 5, 2], [[5]]))
    drawn = figures(wb.run("information-flow", model, one).measured)
    assert set(drawn) == {"token_scores", "keep_sets"}
    plain = figures(wb.run("information-flow", model, ROWS, sweep=False).measured)
    assert not {"flow_by_layer", "direct", "routes"} & set(plain)
