"""Figures of activation attacks: who is where, what a lower bound looks like, what n is."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.activation_attacks_scaling import interval
from probes.figures.activation_attacks import (
    figure_chi,
    figure_dimensions,
    figure_scaling,
    figure_success,
    finding,
)
from probes.figures.theme import SERIES
from tests.probes.figures.plant import named, same, title_of
from tests.probes.figures.test_activation_attacks import planted_result, trace


@pytest.fixture(scope="module")
def result():
    """Seeds that differ, so that resampling them does."""
    success = torch.full((3, 4, 2), torch.nan)
    success[0, 0], success[0, 1] = torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.0])
    success[1, 1], success[1, 2] = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.25])
    success[2, 2], success[2, 3] = torch.tensor([1.0, 0.75]), torch.tensor([0.25, 0.125])
    found = dataclasses.replace(
        planted_result(),
        success=success,
        accuracy=success / 2,
        t_max=torch.tensor([5.0, 9.0, 16.0]),
        t_max_tokens=torch.tensor([1.0, 3.0, 4.0]),
        censored=torch.tensor([False, True, False]),
    )
    assert found.fit.kappa == pytest.approx((5 + 18 + 64) / 21)
    return found


def test_squares_have_means_over_seeds_and_the_share_of_tokens_on_hover(result):
    figure = figure_success(result)
    squares = trace(figure, "tried")
    rows = {
        (x, y): (color, *row)
        for x, y, color, row in zip(
            squares.x, squares.y, squares.marker.color, squares.customdata, strict=True
        )
    }
    for a, (size, lengths) in enumerate(((1, (0, 1)), (2, (1, 2)), (4, (2, 3)))):
        for t in lengths:
            mean = result.success[a, t].mean().item()
            same(rows.pop((size, (4, 8, 16, 17)[t])), [mean, mean, mean / 2])
    assert not rows
    assert (squares.marker.cmin, squares.marker.cmax) == (0, 1)
    assert (squares.marker.symbol, squares.mode) == ("square", "markers")
    assert squares.marker.line.width == 1
    line = trace(figure, "t_max")
    assert (list(line.x), list(line.y)) == ([1, 2, 4], [5, 9, 16])
    assert line.mode == "lines+markers"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 4]
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "4"]
    assert title_of(figure) == "attacked positions a (tokens)"
    assert title_of(figure, "yaxis") == "target length t (tokens)"


@pytest.mark.parametrize(
    ("definition", "unit"),
    [
        ("per-token", "share of target tokens forced"),
        ("all-correct", "share of targets forced whole"),
    ],
)
def test_success_says_what_is_counted(result, definition, unit):
    config = dataclasses.replace(result.config, definition=definition)
    figure = figure_success(dataclasses.replace(result, config=config))
    assert trace(figure, "tried").marker.colorbar.title.text == f"success ({unit})"
    assert unit in figure.layout.title.subtitle.text


def test_the_scaling_line_lies_in_the_band_of_resampled_seeds(result):
    figure = figure_scaling(result)
    low, high, line, points, tokens = figure.data
    kappas = sorted(each.kappa for each in result.resampled)
    ends = interval(kappas)
    assert ends[0] < ends[1]
    for edge, kappa in ((low, ends[0]), (high, ends[1]), (line, result.fit.kappa)):
        same(edge.x, [1, 4])
        same(edge.y, [kappa, 4 * kappa])
    assert (low.showlegend, low.line.width, high.line.width) == (False, 0, 0)
    assert high.fill == "tonexty"
    assert high.name == f"95 % of resampled seeds: {ends[0]:.2g} to {ends[1]:.2g}"
    assert (line.name, line.mode, line.line.dash) == ("t = 4.1 a", "lines", "dash")
    assert list(points.y) == [5, 9, 16]
    assert list(points.customdata) == ["", "at least ", ""]
    assert list(points.marker.symbol) == ["circle", "triangle-up", "circle"]
    assert points.marker.color == line.line.color == SERIES[0]
    assert (list(tokens.x), list(tokens.y)) == ([1, 2, 4], [1, 3, 4])
    assert tokens.name == f"tokens ({(1 + 6 + 16) / 21:.2g} a)"
    assert set(tokens.customdata) == {""}
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    slope = np.polyfit(np.log([1, 2, 4]), np.log([5, 9, 16]), 1)[0]
    assert f"slope of log t on log a: {slope:.2f};" in said
    one = dataclasses.replace(result, t_max=torch.tensor([5.0, 0, 0]), t_max_tokens=None)
    assert "slope" not in figure_scaling(one).layout.title.subtitle.text
    assert len(figure_scaling(one).data) == 4


def test_the_axis_of_lengths_has_numbers_for_all_that_is_drawn(result):
    # Tokens force 1 to 4, activations up to 16; the line ends at 4.14 * 4.
    ticks = figure_scaling(result).layout.yaxis.tickvals
    assert min(ticks) == 1
    assert max(ticks) == 10
    few = dataclasses.replace(result, t_max_tokens=None)
    assert min(figure_scaling(few).layout.yaxis.tickvals) >= 4


def test_chi_has_the_interval_of_kappa_turned_over(result):
    config = dataclasses.replace(result.config, bits=8)
    other = dataclasses.replace(result, config=config, t_max=2 * result.t_max, t_max_tokens=None)
    figure = figure_chi({"b<i>": result, "a": other})
    chi, tokens = named(figure, "activations"), named(figure, "tokens")
    low, high = interval([each.kappa for each in result.resampled])
    # 64 dimensions of 16 bits over kappa tokens of 8 bits.
    bits = 64 * 16 / 8
    assert list(chi.x) == ["b&lt;i&gt;", "a"]
    same(chi.y[:1], [bits / result.fit.kappa])
    same(chi.y[1:], [64 * 8 / 8 / (2 * result.fit.kappa)])
    top = bits / low
    bottom = bits / max(high, result.fit.kappa)
    same(chi.error_y.array[:1], [top - chi.y[0]])
    np.testing.assert_allclose(chi.error_y.arrayminus[0], chi.y[0] - bottom, atol=1e-9)
    assert chi.mode == "markers"
    assert (tokens.y[0], tokens.error_y.array[0]) == (pytest.approx(21 / 23), 0)
    assert tokens.error_y.arrayminus[0] == 0
    said = figure.layout.title.subtitle.text
    assert "p = 8, 16 bits a number" in said.replace("<br>", " ")
    lines = said.split("<br>")
    assert lines[-2].startswith("b&lt;i&gt;: n = 2 contexts of 64 tokens, 12 attacks")
    assert lines[-1].startswith("a: n = ")
    [band] = figure.layout.shapes
    assert (band.name, band.showlegend) == ("large models in the paper: 16 to 25", True)
    assert (band.layer, band.line.width) == ("below", 0)


def test_more_models_make_more_room_above_the_plot(result):
    one, three = (figure_chi({f"m{i}": result for i in range(n)}) for n in (1, 3))
    added = three.layout.margin.t - one.layout.margin.t
    assert added > 0
    assert three.layout.height - one.layout.height == added


def test_chi_has_no_upper_end_where_a_resampled_kappa_is_zero(result):
    success = torch.full((3, 4, 2), torch.nan)
    success[0, 0] = torch.tensor([0.75, 0.0])
    success[1, 0] = success[2, 0] = torch.zeros(2)
    found = dataclasses.replace(
        result, success=success, t_max=torch.tensor([4.0, 0, 0]), t_max_tokens=None
    )
    chi = named(figure_chi({"m": found}), "activations")
    assert interval([each.kappa for each in found.resampled])[0] == 0
    assert chi.error_y.array[0] == 0
    assert chi.error_y.arrayminus[0] >= 0


def test_fewer_dimensions_are_compared_with_the_largest_a(result):
    figure = figure_dimensions(result)
    measured = named(figure, "measured")
    assert (list(measured.x), list(measured.y)) == ([0.25, 0.5], [4.0, 8.5])
    line = named(figure, "in proportion to all dimensions")
    assert (list(line.x), list(line.y)) == ([0, 1], [0, 16])
    assert (line.mode, line.line.dash) == ("lines", "dash")
    assert set(measured.marker.symbol) == {"circle"}
    assert set(measured.customdata) == {""}
    assert "t_max at a = 4 when" in figure.layout.title.subtitle.text


def test_the_finding_lists_what_the_numbers_say(result):
    said = finding(result)
    low, high = interval([each.kappa for each in result.resampled])
    assert said.startswith(
        f"4.1 tokens are forced per attacked position ({low:.2g} to {high:.2g}); chi = "
        f"{128 / result.fit.kappa:.3g} bits in per bit out (p = 16); t_max grows as a^0.84; replaced "
        "tokens force 1.1 each; 1 of 3 t_max are lower bounds: raise t_limit ("
    )
    config = result.config
    assert said.endswith(
        f"(n = 2 contexts of {config.context} tokens, 12 attacks, {config.positions} positions of "
        f"layer {config.layer}, at most {config.steps} steps)."
    )
    calm = dataclasses.replace(result, censored=torch.zeros(3, dtype=torch.bool))
    assert "lower bounds" not in finding(calm)
    assert "replaced" not in finding(dataclasses.replace(result, t_max_tokens=None))
