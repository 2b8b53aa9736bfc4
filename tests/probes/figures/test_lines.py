"""Lines, bands, shades and points that several figures share."""

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from probes.figures.heatmap import HEIGHTS, HeadNumbers, layer_head_heatmap
from probes.figures.lines import head_points, line_style, position_axis, reference_line, shaded
from probes.figures.theme import (
    INK,
    POINTS,
    SERIES,
    SHARES,
    choose_positions,
    head_name,
    log_axis,
    rows_height,
    tick_step,
    titled,
    token_name,
)


def test_lines_are_wider_than_what_they_are_compared_with():
    assert line_style("red", "dot", 3) == {"color": "red", "dash": "dot", "width": 3}
    assert line_style("red")["dash"] == "solid"
    assert reference_line("dash")["width"] == 1 < line_style("red")["width"]
    assert reference_line("dash")["color"] == INK


def test_every_stretch_is_shaded_and_named_once():
    where = np.array([True, False, True, True, False, True])
    x = np.array([0, 1, 2, 3, 4, 9], dtype=float)
    areas = [*shaded(x, where, "name", 0.7)]
    assert [area.showlegend for area in areas] == [True, False, False]
    for area, (left, right) in zip(areas, ((-0.5, 0.5), (1.5, 3.5), (8.5, 9.5)), strict=True):
        assert list(area.x) == [left, left, right, right]
        assert list(area.y) == [0, 0.7, 0.7, 0]
        assert (area.fill, area.line.width, area.hoverinfo) == ("toself", 0, "skip")
    assert not [*shaded(x, np.zeros(6, dtype=bool), "name", 1.0)]


def test_an_axis_of_positions_leaves_room_at_its_ends():
    figure = go.Figure()
    position_axis(figure, np.array([0.0, 50.0]), log_x=False)
    assert tuple(figure.layout.xaxis.range) == (-1, 50.5)
    assert figure.layout.xaxis.title.text == "position (tokens)"
    position_axis(figure, np.array([1.0, 50.0]), log_x=True)
    assert (figure.layout.xaxis.type, figure.layout.xaxis.title.text) == (
        "log",
        "position + 1 (tokens)",
    )


def test_points_of_heads_know_which_they_are():
    values = np.arange(6.0).reshape(2, 3)
    points = head_points(values, 10 * values, HeadNumbers("a number", 100 * values, ".1%"))
    for index, row in enumerate(points.customdata):
        assert list(row) == [index // 3, index % 3, 100 * index]
        assert (points.x[index], points.y[index]) == (index, 10 * index)
    assert points.hovertemplate.endswith("a number: %{customdata[2]:.1%}")
    assert points.mode == "markers"


def test_cells_have_gaps_while_they_are_few():
    for shape, gap in (((20, 20), 1), ((401, 1), 0)):
        [heatmap] = layer_head_heatmap(HeadNumbers("s", np.ones(shape))).data
        assert heatmap.xgap == heatmap.ygap == gap


def test_a_map_has_a_number_for_every_layer_of_a_few_and_grows_within_bounds():
    def drawn(n_layers):
        return layer_head_heatmap(HeadNumbers("s", np.ones((n_layers, 13))))

    assert drawn(12).layout.yaxis.dtick == 1
    assert drawn(13).layout.yaxis.dtick == 2
    assert drawn(2).layout.xaxis.dtick == 2
    assert drawn(2).layout.yaxis.autorange == "reversed"
    assert (drawn(1).layout.height, drawn(96).layout.height) == HEIGHTS
    assert drawn(12).layout.height - drawn(11).layout.height > 15


def test_a_map_of_one_number_diverges_around_zero_all_the_same():
    [heatmap] = layer_head_heatmap(HeadNumbers("s", np.zeros((2, 2))), zero=0.0).data
    assert (heatmap.zmin, heatmap.zmax) == (-1, 1)
    [around] = layer_head_heatmap(HeadNumbers("s", np.array([[3.0, 0.5]])), zero=1.0).data
    assert (around.zmin, around.zmax) == (-1, 3)


# The theme


def test_a_figure_without_a_height_has_the_plot_under_its_title():
    short, long = (
        titled(go.Figure(), "t", " ".join(["word"] * n), "n = 1").layout for n in (5, 99)
    )
    assert long.margin.t - short.margin.t == 4 * (
        titled(go.Figure(), "t", "d", "n = 1\nm").layout.margin.t - short.margin.t
    )
    assert long.height - long.margin.t == short.height - short.margin.t
    assert 300 < short.height < 600
    own = titled(go.Figure(layout={"height": 77}), "t", "d", "n = 1")
    assert own.layout.height == 77
    # The title's two lines of 17 and 12 pixels stand above the plot.
    assert short.margin.t > 2 * 12 + 17


def test_headings_of_panels_are_smaller_than_the_title_and_other_notes_stay():
    figure = go.Figure()
    figure.add_annotation(text="heading", font={"size": 16})
    figure.add_annotation(text="own", font={"size": 12})
    titled(figure, "t", "d", "n = 1")
    assert (
        figure.layout.annotations[0].font.size == 14 < figure.layout.template.layout.title.font.size
    )
    assert figure.layout.annotations[1].font.size == 12


def test_the_second_axis_and_the_second_panel_are_named_on_hover():
    figure = make_subplots(1, 2)
    figure.add_scatter(x=[1], y=[2], name="l", row=1, col=2)
    figure.add_scatter(x=[1], y=[2], row=1, col=1)
    figure.update_layout(xaxis2_title="steps (n)", yaxis2_title="loss (nats)")
    titled(figure, "t", "d", "n = 1")
    assert figure.data[0].hovertemplate == (
        "<b>l</b><br>steps (n): %{x}<br>loss (nats): %{y:.4g}<extra></extra>"
    )
    assert figure.data[1].hovertemplate == "x: %{x}<br>y: %{y:.4g}<extra></extra>"
    heatmap = titled(go.Figure(go.Heatmap(z=[[1]])), "t", "d", "n = 1")
    assert heatmap.data[0].hovertemplate is None
    assert heatmap.layout.xaxis.showgrid is heatmap.layout.yaxis.showgrid is False
    assert figure.layout.xaxis.showgrid is None


def test_tokens_are_named_by_prompt_and_position():
    labels = {"token": [f"<{index}>" for index in range(6)]}
    assert token_name(labels, 1, 2, 3) == ": '&lt;5&gt;'"
    assert token_name({}, 1, 2, 3) == ""
    assert head_name(1, 0) == "L1H0"


@pytest.mark.parametrize(
    ("size", "at_most", "step"),
    [
        (24, 12, 2),
        (25, 12, 5),
        (60, 12, 5),
        (61, 12, 10),
        (120, 12, 10),
        (121, 12, 20),
        (8, 8, 1),
        (9, 8, 2),
    ],
)
def test_ticks_are_as_close_as_the_axis_allows(size, at_most, step):
    assert tick_step(size, at_most) == step
    assert isinstance(tick_step(size, at_most), int)


def test_an_axis_of_a_hundred_billion_has_no_ticks():
    assert tick_step(12 * 5 * 10**9) == 5 * 10**9
    with pytest.raises(ValueError, match="must be under 12e10"):
        tick_step(12 * 10**10)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([3.0, 3000.0], [10, 100, 1000]),
        ([1.0, 10.0], [1, 3, 10]),
        ([1.0, 1e14], [1, 1e3, 1e6, 1e9, 1e12]),
        ([1.0, 1e6], [10**n for n in range(7)]),
        ([1.0, 1e7], [1, 100, 1e4, 1e6]),
        ([2.2, 4.6], [2.2, 2.7, 3.3, 4]),
        ([1.30, 1.37], [1.25, 1.3, 1.35, 1.4]),
        ([131.0, 135.0], [125, 130, 135, 140]),
        ([0.20001, 0.2001], [0.195, 0.2, 0.205, 0.21]),
    ],
)
def test_a_logarithmic_axis_has_round_numbers_near_the_data(values, ticks):
    low, high = min(values) / 1.05, max(values) * 1.05
    found = log_axis(np.array(values))
    assert found["tickvals"] == pytest.approx([tick for tick in ticks if low <= tick <= high])
    assert [float(text) for text in found["ticktext"]] == pytest.approx(found["tickvals"])
    assert "range" not in found


def test_one_value_has_half_and_twice_of_it_around_it():
    for value in (1.0, 7.0, 0.02):
        axis = log_axis(np.array([value, value, np.nan]))
        low, high = 10.0 ** np.array(axis["range"])
        assert low == pytest.approx(value / 2.1)
        assert high == pytest.approx(value * 2.1)
        assert low <= min(axis["tickvals"]) <= max(axis["tickvals"]) <= high


def test_positions_that_are_shown_are_dense_at_both_ends():
    assert len(choose_positions(192)) == 192
    shown = choose_positions(1000, at_most=30)
    assert list(shown[:10]) == list(range(10))
    assert list(shown[-10:]) == list(range(990, 1000))
    assert 24 <= len(shown) <= 30
    gaps = np.diff(shown[10:-10])
    assert (np.diff(gaps) >= -1).all()  # further apart the later they are
    assert {500, 501} <= {*choose_positions(1000, [500, 501], at_most=30).tolist()}


def test_rows_have_their_pixels():
    assert rows_height(10, 20) - rows_height(9, 20) == 20
    assert rows_height(0, 20) == rows_height(0, 99) > 100
    assert SHARES[0] == 0 < 1 < SHARES[1] < 1.1
    assert POINTS[0] < 0 < 1 < POINTS[1] < 1.1
    assert len({*SERIES}) == len(SERIES)
