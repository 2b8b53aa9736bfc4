"""Figures of the attention-sinks probe: what is drawn is what was measured."""

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
from probes.figures.closed_forms import own_query_score, uniform_score
from tests.probes.figures.planted import SINKS, planted_result

RESULT = planted_result()


def trace(figure, name):
    [found] = [one for one in figure.data if one.name == name]
    return found


# What every figure must state


@pytest.mark.parametrize("inputs", ["natural", "swap"])
def test_every_figure_states_n_a_definition_and_units(inputs):
    result = planted_result(position=5, inputs=inputs)
    drawn = figures(result)
    assert ("swap" in drawn) == (inputs == "swap")
    for figure in drawn.values():
        assert "n = 2 prompts of 20 to 30 positions" in figure.layout.title.subtitle.text
        assert len(figure.layout.title.subtitle.text) > 60
        titles = [axis.title.text for axis in figure.select_xaxes()]
        titles += [next(figure.select_yaxes()).title.text]
        assert all(title and "(" in title for title in titles), titles


@pytest.mark.parametrize("draw", [figure_sink_heads, figure_decomposition, figure_swap])
def test_hover_names_layer_and_head(draw):
    templates = [one.hovertemplate for one in draw(RESULT).data if one.hovertemplate]
    assert templates
    assert all("layer %{" in template and "head %{" in template for template in templates)


def test_long_prompts_make_small_figures():
    result = planted_result(lengths=(3000, 2900))
    for figure in figures(result).values():
        assert len(figure.to_json()) < 60_000


# The numbers


def test_heat_map_is_the_mean_over_prompts_at_the_judged_position():
    result = planted_result(position=3)
    heatmap = figure_sink_heads(result).data[0]
    np.testing.assert_allclose(heatmap.z[1, 2], (0.9 + 0.89) / 2, rtol=1e-6)
    mean = (result.score[0, ..., 3] + result.score[1, ..., 3]) / 2
    np.testing.assert_allclose(heatmap.z, mean.numpy(), rtol=1e-6)
    assert heatmap.zmin == 0.0


def test_hover_of_the_heat_map_agrees_with_the_table():
    shown = figure_sink_heads(RESULT).data[0].customdata.reshape(-1, 5)
    table = RESULT.table()
    for column, name in enumerate(["mean_score", "sink_rate", "ov_norm_ratio", "qk_cosine"]):
        np.testing.assert_allclose(shown[:, column], table[name], rtol=1e-5)


def test_heads_that_sink_on_every_prompt_are_marked():
    marked = trace(figure_sink_heads(RESULT), "sinks on every prompt")
    assert set(zip(marked.y, marked.x, strict=True)) == set(SINKS)


def test_a_model_without_sinks_does_not_look_as_if_it_had_some():
    score = RESULT.score.clone()
    score[..., 0] = 0.05
    heatmap = figure_sink_heads(dataclasses.replace(RESULT, score=score))
    assert heatmap.data[0].zmax == 0.3
    assert len(heatmap.data) == 1


@pytest.mark.parametrize("log_x", [False, True])
def test_line_of_a_head_is_its_mean_over_the_prompts_that_reach(log_x):
    figure = figure_score_by_position(RESULT, log_x=log_x)
    line = trace(figure, "L1H2")
    score = RESULT.score[:, 1, 2]
    both = score[:, :20].mean(dim=0)
    np.testing.assert_allclose(line.y[:20], both, rtol=1e-5)
    np.testing.assert_allclose(line.y[20:], score[0, 20:], rtol=1e-5)
    np.testing.assert_array_equal(line.x, np.arange(30) + log_x)
    np.testing.assert_array_equal(line.customdata, np.arange(30))
    assert "position %{customdata}" in line.hovertemplate


@pytest.mark.parametrize("log_x", [False, True])
def test_the_threshold_and_uniform_attention_go_along_the_whole_prompt(log_x):
    figure = figure_score_by_position(RESULT, log_x=log_x)
    bound = trace(figure, "threshold 0.3")
    assert (list(bound.x), list(bound.y)) == ([log_x, 29 + log_x], [0.3, 0.3])
    uniform = trace(figure, "uniform attention")
    np.testing.assert_array_equal(uniform.x, np.arange(30) + log_x)
    np.testing.assert_allclose(uniform.y, uniform_score(np.array([30, 20])), rtol=1e-6)


def test_band_spans_the_heads_that_have_no_line():
    figure = figure_score_by_position(RESULT)
    low, high = [one for one in figure.data if "the other 7 heads" in (one.legendgroup or "")]
    named = {one.name for one in figure.data}
    mean = RESULT.score.nanmean(dim=0)
    rest = [
        mean[layer, head]
        for layer in range(3)
        for head in range(4)
        if f"L{layer}H{head}" not in named
    ]
    np.testing.assert_allclose(low.y, torch.stack(rest).amin(dim=0), rtol=1e-6)
    np.testing.assert_allclose(high.y, torch.stack(rest).amax(dim=0), rtol=1e-6)


def test_the_end_of_the_prompt_is_marked_where_the_own_query_passes_the_threshold():
    figure = figure_score_by_position(planted_result(lengths=(64, 64)))
    area = trace(figure, "own query alone passes the threshold")
    # 1 / (64 - k) > 0.3 for k = 61, 62, 63.
    assert (min(area.x), max(area.x)) == (60.5, 63.5)


def test_closed_forms_match_patterns_summed_by_hand():
    lengths = np.array([4, 2])
    uniform = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    four = uniform.sum(dim=0) / torch.tensor([4, 3, 2, 1])
    two = uniform[:2, :2].sum(dim=0) / torch.tensor([2, 1])
    expected = torch.cat([(four[:2] + two) / 2, four[2:]])
    np.testing.assert_allclose(uniform_score(lengths), expected, rtol=1e-6)
    np.testing.assert_allclose(
        own_query_score(lengths), [(1 / 4 + 1 / 2) / 2, (1 / 3 + 1) / 2, 0.5, 1]
    )
    assert uniform_score(np.array([64]))[0] == pytest.approx(0.0741, abs=1e-4)


def test_norm_panels_compare_the_judged_position_with_the_others():
    result = planted_result(position=2)
    resid, key = [one for one in figure_norms(result).data if one.name == "position 2"][:2]
    np.testing.assert_allclose(resid.y, result.resid_norm[:, 2])
    np.testing.assert_allclose(key.y, result.key_norm[..., 2].mean(dim=1), rtol=1e-6)
    elsewhere = next(one for one in figure_norms(result).data if one.name == "mean elsewhere")
    others = [pos for pos in range(30) if pos != 2]
    np.testing.assert_allclose(elsewhere.y, result.resid_norm[:, others].mean(dim=1), rtol=1e-6)


@pytest.mark.parametrize("position", [0, 4])
def test_norms_along_the_prompt_meet_the_metrics_at_the_judged_position(position):
    result = planted_result(position=position)
    resid, _, value, output = figure_norms_by_position(result, log_x=True).data
    metrics = result.metrics()
    np.testing.assert_allclose(resid.y[position], metrics["resid_peak_ratio"], rtol=1e-5)
    np.testing.assert_allclose(output.y[position], metrics["value_drain"], rtol=1e-5)
    others = [pos for pos in range(30) if pos != position]
    mean = result.value_norm.mean(dim=(0, 1))
    np.testing.assert_allclose(value.y[7], mean[7] / mean[others].mean(), rtol=1e-5)
    np.testing.assert_array_equal(value.x, np.arange(1, 31))
    np.testing.assert_array_equal(value.customdata, np.arange(30))


def test_decomposition_has_a_point_per_head_at_its_cosine_and_norms():
    judged = trace(figure_decomposition(RESULT), "position 0")
    np.testing.assert_allclose(judged.x, RESULT.qk_norm_product[..., 0].flatten())
    np.testing.assert_allclose(judged.y, RESULT.qk_cosine[..., 0].flatten())
    np.testing.assert_allclose(judged.customdata[6], [1, 2, 0.895], rtol=1e-6)
    elsewhere = trace(figure_decomposition(RESULT), "mean elsewhere")
    np.testing.assert_allclose(
        elsewhere.y, RESULT.qk_cosine[..., 1:].mean(dim=-1).flatten(), rtol=1e-5
    )


def test_swap_sets_position_zero_against_the_judged_one():
    result = planted_result(position=5, inputs="swap")
    points = trace(figure_swap(result), "head")
    mean = result.score.nanmean(dim=0)
    np.testing.assert_allclose(points.x, mean[..., 0].flatten())
    np.testing.assert_allclose(points.y, mean[..., 5].flatten())


# Odd results


def test_positions_that_only_hold_nan_are_not_drawn():
    padded = {}
    for name, values in vars(RESULT).items():
        if isinstance(values, torch.Tensor):
            padded[name] = torch.nn.functional.pad(values, (0, 6), value=torch.nan)
    drawn = figures(dataclasses.replace(RESULT, **padded))
    line = trace(drawn["score_by_position"], "L1H2")
    assert len(line.x) == 30
    assert np.isfinite(line.y).all()
    for one in drawn["norms"].data:
        assert np.isfinite(one.y).all()


def test_one_prompt_one_layer_one_head_can_be_drawn():
    one = planted_result(lengths=(12,), n_layers=3, n_heads=4)
    single = dataclasses.replace(
        one,
        **{
            name: getattr(one, name)[:1, :1]
            for name in ("key_norm", "value_norm", "ov_norm", "qk_cosine", "qk_norm_product")
        },
        score=one.score[:, :1, :1],
        resid_norm=one.resid_norm[:2],
    )
    drawn = figures(single)
    assert "n = 1 prompt of 12 positions" in drawn["norms"].layout.title.subtitle.text


# The sentence


def test_finding_says_the_headline_numbers():
    text = finding(RESULT)
    # 2 of 12 heads sink on both prompts.
    assert text.startswith("16.7% of (prompt, layer, head) triples sink at position 0")
    assert "L1H2, gives it 90% of its attention" in text or "L1H2, gives it 89%" in text
    assert f"{RESULT.metrics()['value_drain']:.2f} times" in text
    assert text.endswith("(natural inputs, n = 2 prompts of 20 to 30 positions).")


def test_finding_of_a_swap_gives_both_positions():
    text = finding(planted_result(position=5, inputs="swap"))
    assert "16.7% of (prompt, layer, head) triples sink at position 5" in text
    assert "0.0% do at position 0" in text
