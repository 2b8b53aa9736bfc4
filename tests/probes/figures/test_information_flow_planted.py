"""Figures of information flow draw each number at its prompt, item and token."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import information_flow
from probes.figures.information_flow import figures, finding
from probes.figures.information_flow_routes import figure_routes
from probes.figures.theme import INK, SERIES
from tests.probes.figures import plant
from tests.probes.figures.plant import named, same, title_of

PAIRS = [*((0, a, b) for a in range(3) for b in range(3) if a != b), (1, 0, 1), (1, 1, 0)]
"""prompt, receiving item, giving item; the third prompt has one item."""


@pytest.fixture
def result():
    return plant.flow()


@pytest.fixture
def drawn(result):
    return plant.Drawn(information_flow, result)


def at(values):
    return [values[pair].item() for pair in PAIRS]


def test_extras_are_drawn_where_they_were_measured(result, drawn):
    extras = ["flow", "leakage", "flow_by_layer", "direct", "routes"]
    drawn = figures(result)
    assert list(drawn) == ["token_scores", "keep_sets", *extras]
    for field, name in (
        ("flow_by_layer", "flow_by_layer"),
        ("flow_direct", "direct"),
        ("route_edges", "routes"),
    ):
        less = figures(dataclasses.replace(result, **{field: None}))
        assert {*drawn} - {*less} == {name}


def test_every_token_of_an_item_stands_at_its_place(result, drawn):
    # prompt, item, pos, size, place; of the tokens that carry their item, then of the others
    carrying = [(0, 0, 3, 3, 2), (0, 1, 4, 1, 0), (1, 0, 0, 1, 0), (1, 1, 2, 2, 0), (2, 0, 3, 2, 1)]
    redundant = [
        (0, 0, 1, 3, 0),
        (0, 0, 2, 3, 1),
        (0, 2, 6, 1, 0),
        (1, 1, 3, 2, 1),
        (2, 0, 2, 2, 0),
    ]
    marks = drawn["token_scores"].data
    assert [trace.name for trace in marks] == ["representative", "redundant"]
    for trace, rows in zip(marks, (carrying, redundant), strict=True):
        found = {
            (*map(int, row[:4]), int(x)): (y, row[4])
            for row, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
        }
        assert {*found} == {*rows}
        for (prompt, item, pos, size, place), (score, token) in found.items():
            assert score == result.keep_score[prompt, pos].item(), (item, size, place)
            assert token == f": 't{7 * prompt + pos}'"
        assert trace.mode == "markers"
    said = drawn["token_scores"].layout.title.subtitle.text
    assert "n = 6 items in 3 prompts" in said
    assert f"from {result.config.tau:g} of" in said.replace("<br>", " ")
    assert drawn["token_scores"].layout.xaxis.dtick == 1


def test_keep_sets_are_means_over_the_items_that_exist(result, drawn):
    score, correct = drawn["keep_sets"].data
    exists = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    kept = [0, 1, 3, 4]  # there were no pads
    names = ["everything", "the<br>prompt's<br>tokens", "the<br>item<br>alone"]
    for bar, values in ((score, result.keep_set_score), (correct, result.keep_set_correct)):
        mean = torch.stack([values[row].float() for row in exists]).mean(dim=0)
        same(bar.y, mean[kept])
        assert list(bar.x) == [*names, "without<br>redundant<br>tokens"]
    assert (score.name, correct.name) == (
        "mean score (cosine)",
        "read as itself (share of items)",
    )
    assert score.hovertemplate.endswith(f"<extra>{score.name}</extra>")
    assert drawn["keep_sets"].layout.barmode == "group"
    assert title_of(drawn["keep_sets"]) == "kept of the prompt (keep-set)"


def test_the_flow_matrix_is_a_mean_over_the_prompts_that_have_both(result, drawn):
    [heatmap] = drawn["flow"].data
    expected = result.flow[0].clone()
    for a, b in ((0, 1), (1, 0)):
        expected[a, b] = (result.flow[0, a, b] + result.flow[1, a, b]) / 2
    expected.fill_diagonal_(torch.nan)
    same(heatmap.z, expected)
    assert list(heatmap.x) == list(heatmap.y) == ["0", "1", "2"]
    assert heatmap.zmin == 0.0
    assert heatmap.xgap == heatmap.ygap == 1
    figure = drawn["flow"]
    assert title_of(figure) == "from item (order in the prompt)"
    assert title_of(figure, "yaxis") == "to item (order in the prompt)"
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert "item %{y} receives %{z:.4f} from item %{x}" in heatmap.hovertemplate


def test_pairs_of_items_are_marks_of_leak_and_of_direct_flow(result, drawn):
    for name, values in (("leakage", result.leak_score), ("direct", result.flow_direct)):
        marks = drawn[name].data[0]
        assert [tuple(row) for row in marks.customdata] == PAIRS
        assert list(marks.x) == at(result.flow)
        assert list(marks.y) == at(values)
        assert marks.mode == "markers"
        assert marks.name == "ordered pair of items"
        assert "n = 8 ordered pairs in 3 prompts" in drawn[name].layout.title.subtitle.text
    [line] = drawn["leakage"].layout.shapes
    assert (line.y0, line.y1, line.line.color) == (0, 0, INK)
    equal = named(drawn["direct"], "equal")
    most = 1.05 * max(*at(result.flow), *at(result.flow_direct))
    same(equal.x, [0, most])
    same(equal.y, [0, most])
    assert title_of(drawn["direct"]).startswith("flow: the other item taken away")
    assert title_of(drawn["direct"], "yaxis").startswith("flow: attention to it knocked out")


def test_no_flow_at_all_has_a_line_of_equal_flows(result):
    zero = torch.zeros(3, 3, 3)
    figure = information_flow.figure_direct(
        dataclasses.replace(result, flow=zero, flow_direct=zero)
    )
    assert figure.data[1].x[1] > 0


def test_leaks_are_counted_over_items_in_company(result):
    correct = torch.tensor([[False, True, True], [False, False, True], [False, True, True]])
    patched = torch.tensor([[True, True, True], [False, True, True], [False, True, True]])
    leaking = dataclasses.replace(result, correct=correct, correct_patched=patched)
    said = information_flow.figure_leakage(leaking).layout.title.subtitle.text.replace("<br>", " ")
    assert "60.0% of items read as another, 20.0% with their uncontextualised" in said
    calm = torch.ones(3, 3, dtype=torch.bool)
    none = information_flow.figure_leakage(
        dataclasses.replace(leaking, correct=calm, correct_patched=calm)
    )
    assert "0.0% of items read as another, 0.0% with" in none.layout.title.subtitle.text.replace(
        "<br>", " "
    )
    found = finding(leaking)
    flow = np.mean(at(result.flow))
    assert "60% of items read as another, 20% with their own representation put back" in found
    assert f"another item changes an item by {flow:.2f} of its norm" in found
    assert found.startswith("83% of items have a token that carries them alone; ")
    # Of the seven tokens of longer items three carry them.
    assert "57% of tokens in longer items do not; " in found
    assert found.endswith("(n = 6 items in 3 prompts).")


def test_layer_bars_have_the_standard_error_over_prompts_with_pairs(result, drawn):
    [bars] = drawn["flow_by_layer"].data
    two = result.flow_by_layer[:2]
    assert list(bars.x) == [0, 1, 2, 3]
    same(bars.y, (two[0] + two[1]) / 2)
    # Two numbers a apart: their deviation is a / sqrt(2), the error of their mean a / 2.
    same(bars.error_y.array, (two[0] - two[1]).abs() / 2)
    assert drawn["flow_by_layer"].layout.xaxis.dtick == 1
    assert "n = 2 prompts with at least two" in drawn["flow_by_layer"].layout.title.subtitle.text


def test_one_prompt_has_no_standard_error(result):
    one = {
        field.name: value[:1]
        for field in dataclasses.fields(result)
        if isinstance(value := getattr(result, field.name), torch.Tensor)
        and not field.name.startswith("route")
    }
    [bars] = information_flow.figure_flow_by_layer(dataclasses.replace(result, **one)).data
    assert bars.error_y.array is None
    same(bars.y, result.flow_by_layer[0])


# Routes


def segments(trace):
    """The lines of a trace, which None takes apart, as (x0, y0, x1, y1)."""
    points = [*zip(trace.x, trace.y, strict=True)]
    assert points[2::3] == [(None, None)] * (len(points) // 3)
    return [(*points[i], *points[i + 1]) for i in range(0, len(points), 3)]


def test_edges_are_lines_of_their_kind_and_as_wide_as_they_are_important(result, drawn):
    lines = [trace for trace in drawn["routes"].data if trace.mode == "lines"]
    found = [(trace.name, trace.line.width, segments(trace)) for trace in lines]
    # Attention ends in the middle of its block, the MLP leads from there beside the stream.
    assert [(name, ends) for name, _, ends in found] == [
        ("attention", [(1, 0, 4, 0.5)]),
        ("attention", [(0, 0, 3, 0.5)]),
        ("attention", [(2, 1, 6, 1.5)]),
        ("residual stream", [(4, 0, 4, 1)]),
        ("residual stream", [(6, 1, 6, 2)]),
        ("MLP", [(4.18, 1.5, 4.18, 2)]),
    ]
    # Importance 0.05, 0.1, 0.5; 0.29, 1; 0.3: bounds belong to the class above.
    widths = [width for _, width, _ in found]
    thin, middle, thick = sorted({*widths})
    assert widths == [thin, middle, thick, middle, thick, thick]
    assert thick - middle == middle - thin
    assert thin >= 1
    colors = [trace.line.color for trace in lines]
    assert colors == [SERIES[0]] * 3 + [INK] * 2 + [SERIES[1]]


def test_middles_of_edges_name_them(result, drawn):
    [middles] = [trace for trace in drawn["routes"].data if trace.showlegend is False][-1:]
    rows = [*zip(middles.x, middles.y, map(list, middles.customdata), strict=True)]
    assert len(rows) == 6
    assert rows[0][:2] == (2.5, 0.25)
    assert rows[0][2][:4] == [0, "head 2", "1: 't1'", "4: 't4'"]
    assert rows[2][2][:4] == [0, "residual stream", "4: 't4'", "4: 't4'"]
    assert rows[3][:2] == (4, 1.25)
    assert rows[3][2][:2] == [1, "MLP"]
    assert rows[1][2][1] == "head 1"
    same([row[2][4] for row in rows], result.route_importance[:6])


def test_routes_of_a_prompt_start_at_its_items(result):
    figure = figure_routes(result, 1)
    items = figure.data[-1]
    assert (list(items.x), list(items.y)) == ([0, 2, 3], [4, 4, 4])
    assert items.mode == "markers"
    assert items.marker.symbol == "diamond"
    assert "n = 2 edges of 1 prompt" in figure.layout.title.subtitle.text
    assert figure.layout.title.text.endswith("prompt 1")
    assert tuple(figure.layout.xaxis.range) == (-0.5, 6.5)
    assert figure.data[-2].customdata[0][2] == "0: 't7'"
    empty = figure_routes(result, 2)
    assert list(empty.data[-1].y) == [1, 1]
    assert "n = 0 edges" in empty.layout.title.subtitle.text


def test_deep_routes_have_round_numbers_of_blocks(result):
    edges = torch.tensor([[0, layer, 0, 1, 4] for layer in range(12)])
    share = torch.full((12,), 0.5)
    figure = figure_routes(dataclasses.replace(result, route_edges=edges, route_importance=share))
    assert figure.layout.yaxis.dtick == 2  # 13 depths are too many for a number each
    assert list(figure.data[-1].y) == [12] * 5
