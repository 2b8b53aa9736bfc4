"""The shared look: what every figure states, and axes that can be read."""

import numpy as np
import plotly.graph_objects as go
import pytest

from probes.figures.theme import (
    INK,
    SERIES,
    choose_positions,
    head_name,
    log_axis,
    plain,
    tick_step,
    titled,
    wrapped,
)


def test_title_carries_the_definition_and_n():
    figure = titled(go.Figure(), "Norms", "the length of a vector " * 10, "n = 3 prompts")
    subtitle = figure.layout.title.subtitle.text
    assert figure.layout.title.text == "Norms"
    assert "the length of a vector" in subtitle
    assert subtitle.endswith("<br>n = 3 prompts")
    assert max(map(len, subtitle.split("<br>"))) <= 101


def _contrast(one, other):
    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_text_and_lines_can_be_seen_on_light_and_dark_pages(page):
    assert _contrast(INK, page) >= 4.2
    for color in SERIES:
        assert _contrast(color, page) >= 3.0, color


@pytest.mark.parametrize(("size", "step"), [(1, 1), (12, 1), (13, 2), (48, 5), (80, 10)])
def test_ticks_of_indices_are_whole_and_at_most_a_dozen(size, step):
    assert tick_step(size) == step


def test_head_name_is_the_papers():
    assert head_name(3, 7) == "L3H7"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1.0, 1000.0], ["1", "10", "100", "1000"]),
        ([0.2, 1.1], ["0.2", "0.5", "1"]),
        ([0.78, 1.72], ["0.8", "1", "1.2", "1.5", "1.8"]),
        ([0.97, 1.04], ["0.95", "1", "1.05"]),
    ],
)
def test_log_axis_has_plain_numbers(values, ticks):
    assert log_axis(np.array(values))["ticktext"] == ticks


def test_log_axis_of_one_value_has_it_in_the_middle():
    axis = log_axis(np.array([1.0, 1.0]))
    assert axis["ticktext"] == ["0.5", "1", "2"]
    assert sum(axis["range"]) == pytest.approx(0.0, abs=1e-9)


def test_marks_without_a_hover_name_their_line_and_both_axes():
    figure = go.Figure()
    figure.add_scatter(x=[1], y=[2], name="loss")
    figure.add_scatter(x=[1], y=[2], hoverinfo="skip")
    figure.add_scatter(x=[1], y=[2], hovertemplate="own")
    figure.add_bar(x=[1.5], y=["a"], orientation="h")
    figure.update_xaxes(title="step (updates)")
    figure.update_yaxes(title="loss (nats)")
    found = [trace.hovertemplate for trace in titled(figure, "t", "d", "n = 1").data]
    assert found[0] == (
        "<b>loss</b><br>step (updates): %{x}<br>loss (nats): %{y:.4g}<extra></extra>"
    )
    assert found[1] is None
    assert found[2] == "own"
    assert found[3] == "step (updates): %{x:.4g}<br>loss (nats): %{y}<extra></extra>"


def test_texts_from_elsewhere_lose_their_markup_and_long_names_their_length():
    assert plain("<b>a</b> & 'b'") == "&lt;b&gt;a&lt;/b&gt; &amp; 'b'"
    assert wrapped(["day prefixes", "days"]) == ["day<br>prefixes", "days"]


def test_log_axis_leaves_out_what_has_no_logarithm():
    assert log_axis(np.array([np.nan, 0.0, -1.0])) == {"type": "log"}
    assert log_axis(np.array([np.nan, 0.0, 1.0, 100.0]))["ticktext"] == ["1", "10", "100"]


def test_short_prompts_show_every_position_and_long_ones_their_ends():
    np.testing.assert_array_equal(choose_positions(100), np.arange(100))
    shown = choose_positions(5000, [2777])
    assert {0, 1, 2, 2777, 4998, 4999} <= set(shown.tolist())
    assert len(shown) < 200
    assert (np.diff(shown) > 0).all()
