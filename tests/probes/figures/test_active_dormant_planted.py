"""Figures of active-dormant: every head, domain and block stands where its numbers are."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures.active_dormant import (
    SMALLEST,
    figure_difference,
    figure_domains,
    figure_residual_peak,
    figures,
    finding,
    marker_sizes,
)
from probes.figures.theme import DASHES, SERIES
from tests.probes.figures.plant import named, place, same, title_of
from tests.probes.figures.test_active_dormant import planted_result

PAIR = (2, 1)
"""Domains on the axes; neither is where the default is."""


@pytest.fixture
def result():
    found = planted_result(3)
    q = torch.linspace(0.001, 0.6, 6).reshape(2, 3)
    return dataclasses.replace(found, q_sink=q, q_loss=q.flip(0))


@pytest.fixture
def domains(result):
    return figure_domains(result, *PAIR)


def heads_of(figure):
    """Layer and head of every point, with its place."""
    return {
        (int(row[0]), int(row[1])): (x, y, row, size, trace)
        for trace in figure.data
        if trace.customdata is not None
        for x, y, row, size in zip(
            trace.x, trace.y, trace.customdata, trace.marker.size, strict=True
        )
    }


def test_points_of_heads_have_both_domains_and_all_numbers(result, domains):
    found, (a, b) = heads_of(domains), PAIR
    assert len(found) == 6
    size = marker_sizes(result.ablation_loss[[a, b]].amax(dim=0).numpy())
    for (layer, head), (x, y, row, diameter, _) in found.items():
        at = (layer, head)
        same([x, y], result.sink_attention[[a, b], layer, head])
        expected = []
        for name in ("ablation_loss", "bos_loss", "value_norm_ratio", "sink_logit_gap"):
            expected += [getattr(result, name)[domain][at] for domain in (a, b)]
        same(row[2:], [*expected, result.q_sink[at], result.q_loss[at]])
        same(diameter, size[at])
    template = found[0, 0][-1].hovertemplate
    for column, line in (
        (2, "loss when zeroed: chess %{customdata[2]:.3g}, code %{customdata[3]:.3g}"),
        (4, "loss when moved to BOS: chess %{customdata[4]:.3g}, code %{customdata[5]:.3g}"),
        (6, "value norm ratio: chess %{customdata[6]:.3g}, code %{customdata[7]:.3g}"),
        (8, "sink-logit gap: chess %{customdata[8]:.3g}, code %{customdata[9]:.3g}"),
        (10, "q: sink %{customdata[10]:.2g}, loss %{customdata[11]:.2g}"),
    ):
        assert line in template, column
    assert title_of(domains) == "sink attention in chess (share)"
    assert title_of(domains, "yaxis") == "sink attention in code (share)"
    assert domains.layout.title.text == "Heads in chess and in code"


def test_points_can_be_seen_through_and_have_an_edge(domains):
    for *_, trace in heads_of(domains).values():
        assert 0 < trace.marker.opacity < 1
        assert trace.marker.line.width == 1
        assert trace.mode == "markers"
    assert domains.layout.legend.itemsizing == "constant"


def test_the_threshold_is_a_cross_and_equality_a_diagonal(result, domains):
    cross = named(domains, f"threshold {result.config.sink_threshold:g}")
    bound = result.config.sink_threshold
    (low, high) = domains.layout.xaxis.range
    assert list(cross.x) == [bound, bound, None, low, high]
    assert list(cross.y) == [low, high, None, bound, bound]
    equal = named(domains, "equal")
    assert list(equal.x) == list(equal.y)
    assert equal.x[0] < 0.1
    assert equal.x[1] > 0.9


def test_sizes_without_any_loss_are_the_smallest():
    assert marker_sizes(np.array([[-1.0, 0.0]])).tolist() == [[SMALLEST, SMALLEST]]


def test_the_difference_is_first_less_second_with_marks_where_it_is_real(result):
    figure = figure_difference(result, *PAIR)
    heatmap, marks = figure.data
    (a, b), sink = PAIR, result.sink_attention
    same(heatmap.z, sink[a] - sink[b])
    columns = [sink[a] - sink[b], sink[a], sink[b], result.ablation_loss[a]]
    columns += [result.ablation_loss[b], result.q_sink]
    same(heatmap.customdata, torch.stack(columns, dim=-1))
    reach = (sink[a] - sink[b]).abs().max().item()
    assert (heatmap.zmin, heatmap.zmax) == (pytest.approx(-reach), pytest.approx(reach))
    fdr = result.config.fdr
    expected = {
        (row, col) for row in range(2) for col in range(3) if result.q_sink[row, col] <= fdr
    }
    assert 0 < len(expected) < 6
    assert {*zip(marks.y, marks.x, strict=True)} == expected
    assert (marks.mode, marks.showlegend) == ("markers", True)
    assert marks.marker.symbol == "circle-open"
    assert marks.marker.line.width == 2
    assert marks.name == f"differs (q <= {fdr:g})"
    bar = heatmap.colorbar.title.text
    assert bar == "sink attention, chess - code"
    calm = dataclasses.replace(result, q_sink=torch.ones(2, 3))
    assert len(figure_difference(calm).data) == 1


def test_at_most_three_pairs_have_figures_of_their_own():
    names = [name for name in figures(planted_result(4)) if name.startswith("difference")]
    assert names == [
        "difference_prose_code",
        "difference_prose_chess",
        "difference_prose_music",
    ]


def test_the_residual_norm_has_a_line_a_domain_and_the_peak_a_bar_a_part(result):
    figure = figure_residual_peak(result)
    expected = [
        (f"{name}, {domain}", norms[row], SERIES[row], dash)
        for name, norms, dash in (
            ("first token", result.resid_norm_bos, DASHES[0]),
            ("mean elsewhere", result.resid_norm_rest, DASHES[1]),
        )
        for row, domain in enumerate(("prose", "code", "chess"))
    ]
    for trace, (name, values, color, dash) in zip(figure.data, expected, strict=False):
        assert (trace.name, place(trace)) == (name, 1)
        assert list(trace.x) == [0, 1, 2]
        same(trace.y, values)
        assert (trace.line.color, trace.line.dash) == (color, dash)
    bars = figure.data[6:]
    for row, bar in enumerate(bars):
        assert (bar.name, place(bar)) == (("attention", "MLP")[row], 2)
        assert list(bar.x) == [0, 1]
        peak = result.resid_norm_bos.amax(dim=1)
        same(bar.y, (result.peak_without[:, row] / peak[:, None]).mean(dim=0))
    assert len(bars) == 2
    [whole] = figure.layout.shapes
    assert (whole.y0, whole.y1, whole.yref) == (1, 1, "y2")
    assert [axis.title.text for axis in figure.select_xaxes()] == [
        "blocks passed (number)",
        "block (index)",
    ]
    left, right = figure.select_yaxes()
    assert (left.title.text, left.type) == ("L2 norm (model units)", "log")
    assert (right.title.text, right.rangemode) == ("peak that is left (share)", "tozero")
    # Numbers for the norms of 1 and of the peak, 100.
    assert min(left.tickvals) == 1
    assert max(left.tickvals) == 100
    headings = [note.text for note in figure.layout.annotations]
    assert headings == ["residual norm", "peak without one part"]


def test_the_finding_counts_heads_and_names_the_first_that_switch(result):
    found = finding(result)
    assert found.startswith(
        "of 6 heads 4 always active, 1 active-dormant, 1 always dormant (L0H1);"
    )
    assert found.endswith("(n = 4 prompts of prose, 5 prompts of code, 6 prompts of chess).")
    dormant = torch.zeros(3, 2, 3, dtype=torch.bool)
    assert "1 always dormant (" not in finding(dataclasses.replace(result, dormant=dormant))
    dormant[0, :, :] = True
    dormant[0, 1, 2] = False
    assert "(L0H0, L0H1, L0H2, L1H0);" in finding(dataclasses.replace(result, dormant=dormant))
