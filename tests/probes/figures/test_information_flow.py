"""Figures of information flow: they show the result's numbers and say what they are."""

import dataclasses

import numpy as np
import pytest
import torch

import workbench as wb
from probes.figures.information_flow import figure_direct, figures, finding, mean_over_pairs
from probes.figures.information_flow_routes import figure_routes
from probes.information_flow_routes import MLP, RESIDUAL
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


def test_marks_of_pairs_are_the_results(result):
    pairs = [(prompt, 1, 0) for prompt in range(3)] + [(prompt, 0, 1) for prompt in range(3)]
    drawn = figures(result)
    for name, across, upwards in (
        ("leakage", result.flow, result.leak_score),
        ("direct", result.flow, result.flow_direct),
    ):
        marks = drawn[name].data[0]
        assert sorted(map(tuple, marks.customdata.tolist())) == sorted(pairs)
        for pair, x, y in zip(marks.customdata.tolist(), marks.x, marks.y, strict=True):
            assert (x, y) == (across[tuple(pair)].item(), upwards[tuple(pair)].item())


@pytest.mark.parametrize("times", [0.5, 3.0])
def test_the_line_of_equal_flows_goes_beyond_every_mark(result, times):
    flow_direct = times * result.flow
    figure = figure_direct(dataclasses.replace(result, flow_direct=flow_direct))
    most = 1.05 * max(result.flow.max().item(), flow_direct.max().item())
    assert list(figure.data[1].x) == list(figure.data[1].y) == pytest.approx([0.0, most])


def test_routes_lead_from_their_depth_to_the_next(result):
    # Block 1: head 1 reads position 0 for position 2, which goes on through stream and MLP.
    edges = torch.tensor([[0, 1, 1, 0, 2], [0, 1, RESIDUAL, 2, 2], [0, 1, MLP, 2, 2]])
    share = torch.tensor([0.05, 0.2, 0.7])
    figure = figure_routes(
        dataclasses.replace(result, route_edges=edges, route_importance=share), prompt=0
    )
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines"}
    ends = {name: [*zip(line.x, line.y, strict=True)][:-1] for name, line in lines.items()}
    assert ends == {
        "attention": [(0, 1), (2, 1.5)],
        "residual stream": [(2, 1), (2, 2)],
        "MLP": [(2.18, 1.5), (2.18, 2)],
    }
    widths = [lines[name].line.width for name in ("attention", "residual stream", "MLP")]
    assert widths == sorted(set(widths))
    items = figure.data[-1]
    assert (list(items.x), list(items.y)) == ([1, 3], [2, 2])


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
