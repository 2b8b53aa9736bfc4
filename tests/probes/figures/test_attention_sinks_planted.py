"""Figures of attention sinks: heads, depths and positions that all differ stand where they belong."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures.attention_sinks import (
    figure_decomposition,
    figure_score_by_position,
    figure_sink_heads,
    figure_swap,
    figures,
    finding,
)
from probes.figures.attention_sinks_norms import figure_norms, figure_norms_by_position
from probes.figures.sink_numbers import drawn_text, n_text
from probes.figures.theme import INK, SERIES, SHARES
from tests.probes.figures.plant import named, place, same, title_of
from tests.probes.figures.planted import planted_result

OTHERS = [pos for pos in range(30) if pos != 3]


@pytest.fixture(scope="module")
def result():
    return planted_result(position=3, inputs="swap")


def test_the_axis_of_positions_is_logarithmic_for_long_prompts_alone():
    for length, kind, title in (
        (256, None, "position (tokens)"),
        (257, "log", "position + 1 (tokens)"),
    ):
        drawn = figures(planted_result(lengths=(length,)))
        for name in ("score_by_position", "norms_by_position"):
            axis = drawn[name].layout.xaxis
            assert (axis.type, axis.title.text) == (kind, title)
            first = drawn[name].data[-1].x[0]
            assert first == (1 if kind else 0)


def test_the_map_of_heads_has_ratios_to_elsewhere_on_hover(result):
    heatmap, marks = figure_sink_heads(result).data
    drain = result.ov_norm[..., 3] / result.ov_norm[..., OTHERS].mean(dim=-1)
    lengths = result.qk_norm_product
    rate = (result.score[..., 3] > result.config.bound).float().mean(dim=0)
    columns = [result.score[..., 3].mean(dim=0), rate, drain, result.qk_cosine[..., 3]]
    columns += [lengths[..., 3] / lengths[..., OTHERS].mean(dim=-1)]
    same(heatmap.customdata, torch.stack(columns, dim=-1))
    assert heatmap.zmax == pytest.approx(0.895)
    assert (marks.mode, marks.showlegend) == ("markers", True)
    assert (marks.marker.color, marks.marker.line.width) == ("white", 1)
    assert heatmap.hovertemplate.count("%{customdata") == 5
    assert "sink rate (share of prompts): %{customdata[1]:.1%}" in heatmap.hovertemplate
    assert title_of(figure_sink_heads(result)) == "head (index)"


def test_scores_are_drawn_from_the_strongest_head_on(result):
    figure = figure_score_by_position(result)
    mean = result.score.nanmean(dim=0)
    order = mean[..., 3].flatten().argsort(descending=True)
    lines = [trace for trace in figure.data if trace.name and trace.name.startswith("L")]
    expected = [divmod(int(index), 4) for index in order[:5]]
    assert [line.name for line in lines] == [f"L{layer}H{head}" for layer, head in expected]
    for rank, (line, (layer, head)) in enumerate(zip(lines, expected, strict=True)):
        same(line.y, mean[layer, head])
        assert line.line.color == SERIES[rank]
        assert line.hovertemplate.startswith(f"<b>layer {layer}, head {head}</b>")
        assert line.mode == "lines"
    low, high = [trace for trace in figure.data if "the other 7" in (trace.legendgroup or "")]
    assert (low.showlegend, high.showlegend, high.fill) == (False, None, "tonexty")
    assert (low.line.width, high.line.width) == (0, 0)
    assert {low.hoverinfo, high.hoverinfo} == {"skip"}
    uniform, bound = (
        named(figure, "uniform attention"),
        named(figure, f"threshold {result.config.bound:g}"),
    )
    assert uniform.line.color == bound.line.color == INK
    assert uniform.line.dash != bound.line.dash
    assert tuple(figure.layout.yaxis.range) == SHARES
    assert figure.data[0].name == "own query alone passes the threshold"
    assert tuple(figure.layout.xaxis.range) == (pytest.approx(-0.58), 29.5)


def test_five_heads_have_a_line_each_and_no_band():
    wide = planted_result(lengths=(12,), n_heads=5)
    parts = ("key_norm", "value_norm", "ov_norm", "qk_cosine", "qk_norm_product")
    one = {name: getattr(wide, name)[:1] for name in parts}
    one |= {"score": wide.score[:, :1], "resid_norm": wide.resid_norm[:2]}
    figure = figure_score_by_position(dataclasses.replace(wide, **one))
    names = [trace.name or "" for trace in figure.data]
    assert sum(name.startswith("L") for name in names) == 5
    assert not [name for name in names if "the other" in name]


def test_long_prompts_say_how_many_positions_are_drawn():
    long = planted_result(lengths=(500, 20))
    figure = figure_score_by_position(long)
    count = len(named(figure, "uniform attention").x)
    assert figure.layout.title.subtitle.text.endswith(
        f"n = 2 prompts of 20 to 500 positions, {count} of them drawn"
    )
    assert drawn_text(np.arange(500), long) == ""
    assert n_text(planted_result(lengths=(12, 12))) == "n = 2 prompts of 12 positions"


def test_norms_are_four_panels_of_the_judged_position_and_the_rest(result):
    figure = figure_norms(result)
    norms = [
        result.resid_norm,
        *(getattr(result, f"{n}_norm").mean(dim=1) for n in ("key", "value", "ov")),
    ]
    headings = ["residual |h|", "key |k|", "value |v|", "output |v W_O|"]
    assert [note.text for note in figure.layout.annotations] == headings
    axes = list(zip(figure.select_xaxes(), figure.select_yaxes(), strict=True))
    for index, norm in enumerate(norms):
        judged, rest = figure.data[2 * index : 2 * index + 2]
        assert (judged.name, rest.name) == ("position 3", "mean elsewhere")
        assert place(judged) == place(rest) == index + 1
        assert list(judged.x) == list(rest.x) == list(range(len(norm)))
        same(judged.y, norm[:, 3])
        same(rest.y, norm[:, OTHERS].mean(dim=1))
        assert judged.showlegend is rest.showlegend is (index == 0)
        assert (judged.line.color, rest.line.color) == (SERIES[1], SERIES[0])
        assert judged.marker.symbol != rest.marker.symbol
        across, down = axes[index]
        assert across.title.text == ("layer (index)" if index else "blocks passed (0: entry)")
        assert across.dtick == 1
        assert (down.type, down.title.text) == ("log", "L2 norm (model units)")
        shown = np.concatenate([judged.y, rest.y])
        inside = [tick for tick in down.tickvals if shown.min() <= tick <= shown.max()]
        assert inside or shown.max() < 1.3 * shown.min()
        assert max(down.tickvals) <= 1.1 * shown.max()


def test_deep_models_have_at_most_eight_numbers_a_panel():
    deep = planted_result(n_layers=8, n_heads=3)
    steps = [axis.dtick for axis in figure_norms(deep).select_xaxes()]
    assert steps == [2, 1, 1, 1]  # nine depths, eight layers


def test_norms_along_the_prompt_are_over_their_mean_elsewhere(result):
    figure = figure_norms_by_position(result)
    ratio = result.resid_norm[:, 3] / result.resid_norm[:, OTHERS].mean(dim=1)
    depth = int(ratio.argmax())
    curves = {
        f"residual |h| after {depth} blocks": result.resid_norm[depth],
        "key |k|": result.key_norm.mean(dim=(0, 1)),
        "value |v|": result.value_norm.mean(dim=(0, 1)),
        "output |v W_O|": result.ov_norm.mean(dim=(0, 1)),
    }
    assert [trace.name for trace in figure.data] == [*curves]
    for trace, values in zip(figure.data, curves.values(), strict=True):
        same(trace.y, values / values[OTHERS].mean())
        assert list(trace.x) == list(trace.customdata) == list(range(30))
        assert trace.hovertemplate.startswith(f"{trace.name}<br>position %{{customdata}}")
        assert trace.mode == "lines"
    axis = figure.layout.yaxis
    assert (axis.type, axis.title.text) == ("log", "norm over its mean elsewhere (ratio)")
    assert min(axis.tickvals) < 0.3 < 50 < max(axis.tickvals)


def test_angle_and_length_of_every_head_are_coloured_by_its_score(result):
    figure = figure_decomposition(result)
    rest, judged = figure.data
    assert (rest.name, judged.name) == ("mean elsewhere", "position 3")
    score = result.score[..., 3].mean(dim=0)
    same(rest.x, result.qk_norm_product[..., OTHERS].mean(dim=-1).flatten())
    same(rest.y, result.qk_cosine[..., OTHERS].mean(dim=-1).flatten())
    same(judged.x, result.qk_norm_product[..., 3].flatten())
    same(judged.marker.color, score.flatten())
    assert (judged.marker.cmin, judged.marker.cmax) == (0, pytest.approx(0.895))
    assert judged.marker.line.width == 1
    assert judged.marker.size > rest.marker.size
    rows = judged.customdata
    assert [tuple(row[:2]) for row in rows] == [
        (layer, head) for layer in range(3) for head in range(4)
    ]
    same([row[2] for row in rows], score.flatten())
    assert figure.layout.xaxis.type == "log"
    assert (figure.layout.yaxis.zeroline, title_of(figure, "yaxis")) == (
        True,
        "cos(q, k) (from -1 to 1)",
    )
    ticks = figure.layout.xaxis.tickvals
    assert 20 <= min(ticks) < max(ticks) <= 42
    weak = dataclasses.replace(result, score=result.score / 10)
    assert figure_decomposition(weak).data[1].marker.cmax == result.config.bound


def test_many_heads_have_small_marks():
    sizes = []
    for n_heads in (100, 101):
        many = planted_result(lengths=(6,), n_layers=4, n_heads=n_heads)
        sizes.append(figure_decomposition(many).data[1].marker.size)
    assert sizes[0] > sizes[1]


def test_the_swap_has_heads_the_diagonal_and_a_corner_of_the_threshold(result):
    figure = figure_swap(result)
    heads, equal, corner = figure.data
    rate = (result.score[..., 3] > result.config.bound).float().mean(dim=0)
    same(heads.customdata[:, 2], rate.flatten())
    assert heads.marker.line.width == 1
    assert list(equal.x) == list(equal.y)
    assert equal.x[0] <= 0 < 1 <= equal.x[1]
    bound = result.config.bound
    assert (list(corner.x), list(corner.y)) == ([0, bound, bound], [bound, bound, 0])
    assert equal.mode == corner.mode == "lines"
    assert equal.line.dash != corner.line.dash
    assert title_of(figure) == "mean score at position 0 (share of attention)"
    assert title_of(figure, "yaxis") == "mean score at 3 (share of attention)"


def test_the_finding_names_the_strongest_head_and_the_largest_ratio(result):
    drain = (result.ov_norm[..., 3] / result.ov_norm[..., OTHERS].mean(dim=-1)).mean()
    peak = (result.resid_norm[:, 3] / result.resid_norm[:, OTHERS].mean(dim=1)).max()
    said = finding(result)
    assert (
        "16.7% of (prompt, layer, head) triples sink at position 3 (score above 0.3); 0.0% do at "
        in said
    )
    assert (
        "; the strongest head, L1H2, gives it 8" in said
        or "; the strongest head, L1H2, gives it 9" in said
    )
    assert f"the residual norm at most {peak:.3g} times (swap inputs, n = 2 prompts" in said
    assert 0 < drain < 0.2
