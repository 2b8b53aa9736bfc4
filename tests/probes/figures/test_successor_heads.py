"""Figures of successor-heads draw the numbers of the result, each at its head, series and digit."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import successor_heads
from probes.figures.successor_heads import figures, finding
from probes.figures.successor_heads_digits import MOST_ROWS, rows_shown
from probes.figures.theme import DASHES, SERIES
from tests.probes.figures import plant
from tests.probes.figures.plant import same, title_of

NAMES = [
    "numbers",
    "number<br>words",
    "days",
    "months",
    "letters",
    "ordinals",
    "roman<br>numerals",
]


@pytest.fixture
def result():
    return plant.successors()


@pytest.fixture
def drawn(result):
    return plant.Drawn(successor_heads, result)


def test_parts_that_were_not_measured_are_not_drawn(result, drawn):
    parts = ["steering", "steering_by_scale", "digit_features", "probe"]
    drawn = figures(result)
    assert list(drawn) == ["heads", "tasks", "filter", "attention", *parts, "text", "categories"]
    left = {"list_attention": {"attention"}, "mod10_features": {*parts}}
    left |= {"winning_share": {"text"}, "winning_categories": {"categories"}}
    for field, missing in left.items():
        assert {*drawn} - {*figures(dataclasses.replace(result, **{field: None}))} == missing


def test_the_map_of_heads_has_the_score_and_more_on_hover(result, drawn):
    [heatmap] = drawn["heads"].data
    same(heatmap.z, result.score)
    assert (heatmap.zmin, heatmap.zmax) == (0.0, 1.0)
    columns = [result.score, result.score_by_task.mean(dim=0)]
    columns += [result.greater_than_bias, result.list_attention]
    same(heatmap.customdata, torch.stack(columns, dim=-1))
    assert heatmap.hovertemplate == (
        "<b>layer %{y}, head %{x}</b><br>score (share of pairs): %{customdata[0]:.3f}"
        "<br>mean over series (share): %{customdata[1]:.3f}"
        "<br>greater-than bias (SD): %{customdata[2]:.3f}"
        "<br>attention in lists (share): %{customdata[3]:.3f}<extra></extra>"
    )
    assert "the best is L2H1" in drawn["heads"].layout.title.text
    assert "n = 161 pairs of 7 series" in drawn["heads"].layout.title.subtitle.text
    less = dataclasses.replace(result, greater_than_bias=None, list_attention=None)
    same(successor_heads.figure_heads(less).data[0].customdata, torch.stack(columns[:2], dim=-1))


def test_bars_of_the_two_best_heads_by_series(result, drawn):
    figure = drawn["tasks"]
    assert [bar.name for bar in figure.data] == ["L2H1", "L0H3"]
    for bar, (layer, head) in zip(figure.data, ((2, 1), (0, 3)), strict=True):
        assert list(bar.x) == NAMES
        same(bar.y, result.score_by_task[:, layer, head])
        assert list(bar.customdata) == [20, 21, 22, 23, 24, 25, 26]
    assert figure.layout.barmode == "group"
    assert (title_of(figure), title_of(figure, "yaxis")) == (
        "series (name)",
        "pairs found (share)",
    )


def test_bars_of_the_filter_are_shares_of_the_items(drawn):
    figure = drawn["filter"]
    tokens, pairs = figure.data
    assert (tokens.name, pairs.name) == ("single tokens", "pairs")
    same(tokens.x, [30 / 40, 20 / 50, 7 / 8, 1, 0.1])
    same(pairs.x, [20 / 40, 10 / 50, 6 / 8, 0.8, 0])
    for bar in figure.data:
        assert list(bar.y) == [f"series {row}" for row in range(5)]
        assert list(bar.customdata) == [f"series {row}: {row} of it kept" for row in range(5)]
        assert bar.orientation == "h"
    assert (figure.layout.yaxis.autorange, figure.layout.yaxis.dtick) == ("reversed", 1)
    assert "n = 113 written items, 63 of them" in figure.layout.title.subtitle.text
    assert figure.layout.barmode == "group"


def test_attention_stands_against_the_score(result, drawn):
    [points] = drawn["attention"].data
    same(points.x, result.score.flatten())
    same(points.y, result.list_attention.flatten())
    same(points.customdata[6], [1, 2, result.score_by_task[:, 1, 2].mean()])
    assert points.marker.line.width == 1
    assert title_of(drawn["attention"]) == "score (share of pairs)"
    assert title_of(drawn["attention"], "yaxis") == "attention to the last item (share)"


def test_text_has_the_prefixes_won_and_the_direct_effect(result, drawn):
    [heatmap] = drawn["text"].data
    same(heatmap.z, result.winning_share)
    same(heatmap.customdata, torch.stack([result.winning_share, result.direct_effect], dim=-1))
    assert drawn["text"].layout.title.subtitle.text.endswith("n = 230 prefixes")


def test_categories_have_a_bar_for_each_judgement(result, drawn):
    figure = drawn["categories"]
    assert [bar.name for bar in figure.data] == ["by rank", "by share"]
    for row, bar in enumerate(figure.data):
        assert list(bar.x) == ["successor", "acronym", "copy"]
        same(bar.y, result.winning_categories[row])
    assert "n = 17 prefixes won of 230" in figure.layout.title.subtitle.text
    assert figure.layout.title.text == "Prefixes that L2H1 wins"
    assert title_of(figure) == "category (first that applies)"
    assert figure.layout.barmode == "group"


# Digits


def test_steering_shows_sources_with_what_was_said(result, drawn):
    figure = drawn["steering"]
    [heatmap] = figure.data
    kept = [0, 1, 3, 4, 5, 6]  # numbers up to 40, and every other series
    assert list(heatmap.y) == [plant.SOURCES[row] for row in kept]
    assert list(heatmap.x) == [str(digit) for digit in range(10)]
    same(heatmap.z, result.steering_table[kept])
    same(heatmap.customdata, result.steered_index[kept])
    assert (heatmap.zmin, heatmap.zmax) == (0, 1)
    assert heatmap.showscale is False
    # Half of the scale is grey, the other half has the colour of what was followed.
    looks = [list(step) for step in heatmap.colorscale]
    assert [at for at, _ in looks] == [0, 0.5, 0.5, 1]
    assert looks[0][1] == looks[1][1] != looks[2][1] == looks[3][1] == SERIES[0]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert figure.layout.yaxis.autorange == "reversed"
    assert "n = 7 sources, 6 of them shown; scale 1" in figure.layout.title.subtitle.text
    assert figure.layout.title.text.endswith("what L2H1 says")


def test_rows_of_many_sources_are_bounded():
    assert rows_shown([f"days:{index}" for index in range(110)]) == list(range(110))
    assert MOST_ROWS == 110
    assert rows_shown([f"days:{index}" for index in range(111)]) == list(range(110))


def test_more_sources_make_a_taller_figure_by_the_same_for_each(result):
    def height(count):
        sources = tuple(f"days:{index}" for index in range(count))
        changes = {"steering_table": torch.zeros(count, 10), "steered_index": torch.ones(count, 10)}
        changes["steered_index"] = changes["steered_index"].long()
        labels = result.labels | {"source": sources}
        return successor_heads.figure_steering(
            plant.successors(labels=labels, **changes)
        ).layout.height

    assert height(30) - height(20) == height(20) - height(10) >= 80
    assert height(10) > 200


def test_steering_by_strength_has_a_line_a_series(result, drawn):
    figure = drawn["steering_by_scale"]
    assert [line.name for line in figure.data] == [*plant.TASKS]
    for index, line in enumerate(figure.data):
        assert list(line.x) == [0.5, 1.0, 2.0, 4.0]
        same(line.y, result.steering_by_scale[:, index])
    # The seventh has the first one's colour, and another dash.
    assert figure.data[6].line.color == figure.data[0].line.color
    assert [line.line.dash for line in figure.data[:6]] == [*DASHES[:5], DASHES[0]]
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == [0.5, 1.0, 2.0, 4.0]
    assert figure.layout.title.subtitle.text.endswith("n = 7 sources x 9 digits")


def test_features_of_digits_have_the_next_digit_marked(result, drawn):
    figure = drawn["digit_features"]
    heatmap, marks = figure.data
    digits = [str(digit) for digit in range(10)]
    same(heatmap.z, result.feature_logits)
    assert (heatmap.zmin, heatmap.zmax) == (-2, 2)
    assert list(heatmap.x) == list(heatmap.y) == digits
    assert list(marks.y) == digits
    assert list(marks.x) == [*digits[1:], "0"]
    assert (marks.mode, marks.marker.symbol) == ("markers", "circle-open")
    assert marks.showlegend is True
    assert marks.marker.size > 9  # a ring around a cell's middle
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert figure.layout.yaxis.autorange == "reversed"
    below = plant.successors(feature_logits=torch.linspace(-3, 1, 100).reshape(10, 10))
    assert successor_heads.figure_digit_features(below).data[0].zmax == 3


def test_the_probes_bars_stand_over_chance(result, drawn):
    bars, chance = drawn["probe"].data
    assert list(bars.x) == list(chance.x) == NAMES
    same(bars.y, result.probe_accuracy_by_task)
    assert np.allclose(chance.y, 0.1)
    assert (chance.name, chance.mode) == ("chance", "lines")
    assert drawn["probe"].layout.title.subtitle.text.endswith("n = 7 items")


# The sentence


def test_the_finding_says_what_was_measured(result):
    assert finding(result) == (
        "L2H1 finds the next item of 90.0% of 161 pairs (chance 5.0%); the runner-up of 70.0%; it "
        f"gives the last item of a list {result.list_attention[2, 1]:.0%} of its attention; a probe of "
        "the last digit, fitted on numbers, is right on 75% of 61 items of other series (chance 10%) "
        "(ln2, first MLP, forms: all)."
    )


def test_the_finding_says_what_was_left_out(result):
    labels = result.labels | {
        "summary": ("chance", "a", "b", "c", "d"),
        "left_out": ("too few",),
    }
    said = finding(dataclasses.replace(result, labels=labels, list_attention=None))
    assert "; features and steering left out: too few (" in said
    assert "attention" not in said


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"mlp0": False}, "(embedding without the first MLP)."),
        ({"ln": "ln2"}, "(ln2, first MLP, forms: "),
        ({"include_residual": True}, "(first MLP plus embedding, forms: "),
    ],
)
def test_the_path_is_stated(result, changes, path):
    plain = {"ln": "none", "include_residual": False, "mlp0": True}
    config = dataclasses.replace(result.config, **(plain | changes))
    assert path in finding(dataclasses.replace(result, config=config))
