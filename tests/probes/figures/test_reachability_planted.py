"""Figures of reachability draw every pair once, at its length, rank and bound."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import reachability
from probes.figures.reachability import MOST_ROWS, finding
from probes.figures.theme import INK, SERIES
from tests.probes.figures.plant import named, same, title_of
from tests.probes.figures.planted_cases import reached
from tests.probes.figures.test_reachability import result_of


def test_the_curve_lies_in_its_band_and_what_is_proved_is_a_line():
    result = reached()
    figure = reachability.figure_k_epsilon(result)
    low, high, curve = figure.data
    for trace, values in (
        (low, result.epsilon_low),
        (high, result.epsilon_high),
        (curve, result.epsilon),
    ):
        assert list(trace.x) == [0, 1, 2, 3, 4]
        same(trace.y, values)
        assert trace.line.shape == "hv"
    assert (low.showlegend, high.showlegend, high.fill) == (False, None, "tonexty")
    assert low.line.width == high.line.width == 0
    assert high.name == "95 % interval, states resampled"
    [proved] = figure.layout.shapes
    assert (proved.y0, proved.y1) == (0.25, 0.25)
    [note] = figure.layout.annotations
    assert note.text == "proved"
    assert figure.layout.title.text == "k-epsilon: 75% reached within 4 tokens"
    tried = ", ".join(str(k) for k, _ in result.config.stages())
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert f"lengths tried: {tried}; targets: {result.config.targets};" in said
    assert not reachability.figure_k_epsilon(result_of([0, 2])).layout.shapes


def test_the_table_has_probabilities_and_says_what_it_leaves_out():
    ranks = torch.tensor([3, 9, 1, 0])
    loss = torch.tensor([0.5, 1.0, 2.0, 3.0])
    labels = {
        "prompt_text": (" a", "b \n", "c\t", ""),
        "state_text": ("s" * 44, "x" + "y" * 44, "z", "q & r"),
        "target_text": (" t ", "  ", "<i>", ""),
    }
    result = result_of(
        [2, 2, 1, -1], base_rank=ranks, base_loss=loss, best_loss=loss / 2, labels=labels
    )
    [table] = reachability.figure_prompts(result).data
    assert list(table.header.values) == [
        *("k", "control", "state", "target", "rank<br>without", "P<br>without", "P<br>with")
    ]
    rows = list(zip(*table.cells.values, strict=True))
    # The shortest first; of the same length the more likely target.
    assert [row[0] for row in rows] == ["1", "2", "2"]
    assert [row[4] for row in rows] == ["1", "3", "9"]
    assert [row[1] for row in rows] == ["c\\t", "␣a", "b \\n"]
    assert [row[2] for row in rows] == ["z", "s" * 44, "…" + "y" * 44]
    assert [row[3] for row in rows] == ["&lt;i&gt;", "␣t␣", "␣␣"]
    for row, nats in zip(rows, (2.0, 0.5, 1.0), strict=True):
        assert row[5:] == (f"{np.exp(-nats):.2g}", f"{np.exp(-nats / 2):.2g}")
    assert (
        "reached pairs shown" not in reachability.figure_prompts(result).layout.title.subtitle.text
    )
    bare = reachability.figure_prompts(dataclasses.replace(result, labels={})).data[0]
    assert list(bare.cells.values[1]) == ["", "", ""]


def test_a_long_table_is_cut_and_grows_with_its_rows():
    def drawn(count):
        return reachability.figure_prompts(result_of([1] * count))

    long = drawn(MOST_ROWS + 3)
    assert len(long.data[0].cells.values[0]) == MOST_ROWS
    assert ", 40 of 43 reached pairs shown" in long.layout.title.subtitle.text
    assert "shown" not in drawn(MOST_ROWS).layout.title.subtitle.text
    row = drawn(5).layout.height - drawn(4).layout.height
    assert row == drawn(4).layout.height - drawn(3).layout.height
    assert row >= drawn(5).data[0].cells.height
    assert drawn(5).data[0].cells.align == drawn(5).data[0].header.align == "left"


def test_points_of_length_and_rank_are_shaken_only_upwards_and_downwards():
    result = result_of([0, 3, -1, 1, 3, -1])
    figure = reachability.figure_length_by_rank(result)
    met, missed = figure.data
    assert list(met.x) == [1, 11, 31, 41]
    assert list(missed.x) == [21, 51]
    assert list(met.customdata) == [0, 3, 1, 3]
    assert list(missed.customdata) == [5, 5]
    for trace in (met, missed):
        away = np.asarray(trace.y) - trace.customdata
        assert (np.abs(away) < 0.5).all()
        assert len({*away}) == len(away)
    assert {*met.y}.isdisjoint({0, 3, 1})
    axis = figure.layout.yaxis
    assert list(axis.tickvals) == [0, 1, 2, 3, 4, 5]
    assert list(axis.ticktext) == ["0", "1", "2", "3", "4", "none"]
    assert figure.layout.xaxis.type == "log"
    # The same result makes the same picture.
    same(reachability.figure_length_by_rank(result).data[0].y, met.y)


def test_heads_are_marks_under_the_bound():
    result = reached()
    figure = reachability.figure_bound(result)
    kept = [1, 3]  # with a control of one token or more
    for head in range(2):
        marks = named(figure, f"L0H{head}")
        same(marks.x, result.head_limit[kept, head])
        same(marks.y, result.head_orthogonal[kept, head])
        assert marks.mode == "markers"
        assert marks.marker.color == SERIES[head]
    line = named(figure, "the bound")
    same(line.x, [0, 1.05 * 1.8])
    same(line.y, line.x)
    assert (line.line.color, line.line.dash, line.mode) == (INK, "dash", "lines")
    found = dataclasses.replace(result, head_orthogonal=2 * result.head_limit)
    same(named(reachability.figure_bound(found), "the bound").x, [0, 2 * 1.05 * 1.8])
    assert title_of(figure).startswith("B(k), the most")
    assert title_of(figure, "yaxis").startswith("|y_perp| found")
    # Of eight heads those with 9 and with no number of tokens: k_max is 4.
    assert "25.0% of (pair, head)" in figure.layout.title.subtitle.text.replace("<br>", " ")


def test_many_heads_differ_in_colour_or_shape():
    wide = {name: torch.rand(2, 20) for name in ("head_limit", "head_orthogonal")} | {
        "head_min_k": torch.ones(2, 20, dtype=torch.long)
    }
    marks = reachability.figure_bound(result_of([1, 2], **wide)).data[:-1]
    assert len({(mark.marker.color, mark.marker.symbol) for mark in marks}) == 20


@pytest.mark.parametrize(
    ("k", "parts"),
    [
        ([0, 2, -1, 4], ["75.0% of the targets", "25.0% without any", "mean length 2 tokens"]),
        ([-1, -1], ["0.0% of the targets", "0.0% without any"]),
    ],
)
def test_the_finding_has_shares_and_the_mean_length(k, parts):
    said = finding(result_of(k))
    assert all(part in said for part in parts)
    assert ("mean length" in said) == (max(k) >= 0)
    assert "proved" not in said
    assert f"n = {len(k)} pairs of state and target, {len(k) // 2} different states" in said
    assert "25.0% are proved to be out of reach" in finding(reached())
