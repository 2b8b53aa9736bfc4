"""Figures of token-dynamics draw the numbers of the result, each on its axis."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import token_dynamics
from probes.figures.theme import DIVERGING, SERIES
from probes.figures.token_dynamics import figures, finding
from probes.figures.token_dynamics_simulation import figure_trajectory
from probes.figures.token_dynamics_sources import figure_sources
from tests.probes.figures import plant
from tests.probes.figures.plant import named, place, same, title_of
from tests.probes.figures.planted_cases import trajectory

LENGTHS = (7, 5, 4)


@pytest.fixture(scope="module")
def walk():
    return plant.walk()


@pytest.fixture
def drawn(walk):
    return plant.Drawn(token_dynamics, walk)


def over_tokens(values, share):
    """A quantile over the tokens that count: not the first, none past a prompt's end."""
    rows = [values[row, 1:length] for row, length in enumerate(LENGTHS)]
    return np.quantile(torch.cat(rows).numpy(), share, axis=0)


def test_bars_of_the_steps_are_medians_with_quartiles(walk, drawn):
    relative = walk.step_norm / walk.waypoint_norm[..., :-1]
    bars = drawn["steps"].data
    assert [bar.name for bar in bars] == 2 * ["attention (aggregate)", "MLP (filter)"]
    assert [place(bar) for bar in bars] == [1, 1, 2, 2]
    for index, bar in enumerate(bars):
        values = (walk.step_norm, relative)[index // 2][..., index % 2 :: 2]
        low, middle, high = (over_tokens(values, share) for share in (0.25, 0.5, 0.75))
        assert list(bar.x) == [0, 1, 2, 3, 4]
        same(bar.y, middle)
        same(bar.error_y.array, high - middle)
        same(bar.error_y.arrayminus, middle - low)
        assert bar.hovertemplate.startswith(f"block %{{x}}, {bar.name}<br>median %{{y")
    assert title_of(drawn["steps"], "yaxis") == "step length (model units)"
    assert title_of(drawn["steps"], "yaxis2") == "relative step (ratio)"
    headings = [note.text for note in drawn["steps"].layout.annotations]
    assert headings == ["step length |s|", "relative step |s| / |r|"]
    attention = walk.step_norm[..., ::2].sum(-1) / walk.step_norm.sum(-1)
    tokens = torch.cat([attention[row, 1:n] for row, n in enumerate(LENGTHS)])
    assert f"attention walks {tokens.median():.0%} of it" in drawn["steps"].layout.title.text


def test_arrival_has_shares_on_one_axis_and_nats_on_the_other(walk, drawn):
    figure = drawn["arrival"]
    arrived = torch.cat([walk.arrival[row, 1:n] for row, n in enumerate(LENGTHS)])
    expected = {
        "final argmax is first (logit lens)": ("y", range(11), walk.lens_agreement.mean(0)),
        "has arrived for good": (
            "y",
            range(11),
            [(arrived <= at).double().mean() for at in range(11)],
        ),
        "KL of the logit lens": ("y2", range(11), walk.lens_kl.mean(0)),
        "KL of the tuned lens": ("y2", range(0, 10, 2), walk.tuned_kl.mean(0)),
    }
    assert [trace.name for trace in figure.data] == [*expected]
    for trace, (axis, x, y) in zip(figure.data, expected.values(), strict=True):
        assert (trace.yaxis or "y") == axis
        assert list(trace.x) == list(x)
        same(trace.y, y)
    shares, nats = figure.layout.yaxis, figure.layout.yaxis2
    assert shares.title.text == "tokens (share)"
    assert nats.title.text == "KL(final || lens) (nats)"
    assert (nats.side, nats.rangemode, nats.showgrid) == ("right", "tozero", False)
    assert nats.tickmode == "auto"  # its own numbers, not those of the grid of shares


def test_without_a_tuned_lens_there_is_no_line_of_it(walk):
    names = [
        t.name for t in token_dynamics.figure_arrival(dataclasses.replace(walk, tuned_kl=None)).data
    ]
    assert "KL of the tuned lens" not in names
    assert len(names) == 3


def test_angles_are_means_over_prompts_beside_their_controls(walk, drawn):
    figure = drawn["angles"]
    for rank, view in enumerate(("raw", "centred", "after the final norm")):
        to_end, turning = (named(figure, view, number) for number in (0, 1))
        assert (place(to_end), place(turning)) == (1, 2)
        assert list(to_end.x) == list(range(11))
        assert list(turning.x) == list(range(1, 10))  # at the waypoint between the two steps
        same(to_end.y, walk.view_cosine[rank].mean(0))
        same(turning.y, walk.view_turning[rank].mean(0))
    pair = named(figure, "two different tokens (anisotropy)")
    null = named(figure, "steps in random order (null)")
    assert (place(pair), place(null)) == (1, 2)
    assert (list(pair.x), list(null.x)) == (list(range(11)), list(range(1, 10)))
    same(pair.y, walk.pair_cosine.mean(0))
    same(null.y, walk.turning_null.mean(0))
    for axis in figure.select_yaxes():
        assert axis.title.text == "mean cosine (from -1 to 1)"
        assert axis.zeroline is True


def test_association_has_bars_of_the_bias_and_a_line_of_the_entropy_gap(walk, drawn):
    figure = drawn["association"]
    bar, line = figure.data
    assert (bar.name, bar.type) == ("association bias", "bar")
    assert bar.yaxis in (None, "y")
    assert (line.name, line.type, line.yaxis) == ("entropy gap", "scatter", "y2")
    assert list(bar.x) == list(line.x) == [0, 1, 2, 3, 4]
    same(bar.y, walk.association_bias.mean(0))
    same(line.y, walk.entropy_gap.mean(0))
    assert line.line.color == SERIES[1]
    left, right = figure.layout.yaxis, figure.layout.yaxis2
    assert left.title.text == "|bias| / |attn_out| (ratio)"
    assert right.title.text == "entropy gap (nats)"
    assert left.rangemode == right.rangemode == "tozero"
    assert (right.showgrid, right.tickmode) == (False, "auto")
    kept = 1 - walk.kl_uniform.mean() / walk.kl_zero.mean()
    assert f"keeps {kept:.0%} of" in figure.layout.title.text


@pytest.mark.parametrize(
    ("prompt", "query", "pos"), [(0, 0, 6), (1, 0, 4), (2, 0, 3), (0, 1, 2), (2, 1, 2)]
)
def test_sources_are_those_that_the_query_sees(walk, prompt, query, pos):
    figure = figure_sources(walk, prompt, query)
    [heatmap] = figure.data
    share = walk.attribution_share[prompt, query, :, : pos + 1]
    assert list(heatmap.x) == list(range(pos + 1))
    same(heatmap.z, share)
    end = np.quantile(share.abs().numpy(), 0.99)
    assert (heatmap.zmin, heatmap.zmax) == (pytest.approx(-end), pytest.approx(end))
    diverging = type(heatmap)(colorscale=DIVERGING).colorscale
    assert heatmap.colorscale == diverging
    for layer in range(5):
        for key in range(pos + 1):
            length, token = heatmap.customdata[layer][key]
            assert length == f"{walk.attribution_norm[prompt, query, layer, key]:.3g}"
            assert token == f": 't{7 * prompt + key}'"
    assert f"at position {pos} " in figure.layout.title.text
    said = figure.layout.title.subtitle.text
    assert said.endswith(f"n = 1 prompt (index {prompt}), {pos + 1} source tokens")
    assert figure.layout.yaxis.autorange == "reversed"
    assert title_of(figure) == "source token (position)"


def test_sources_that_add_nothing_have_a_scale_and_long_prompts_say_what_is_drawn():
    walk = plant.walk()
    walk.attribution_share[:] = 0
    assert figure_sources(walk).data[0].zmax == 1.0
    long = plant.walk(n_pos=500)
    figure = figure_sources(long)
    shown = np.asarray(figure.data[0].x)
    assert len(shown) < 200
    assert {0, 499} <= {*shown}
    same(figure.data[0].z, long.attribution_share[0, 0][:, shown])
    assert f"500 source tokens, {len(shown)} of them drawn" in figure.layout.title.subtitle.text


def test_the_decoding_path_is_a_mean_with_its_deviation_over_prompts(walk):
    walk = dataclasses.replace(walk, proximity=walk.proximity.clone())
    walk.proximity[2, 2] = torch.nan
    figure = token_dynamics.figure_decoding(walk)
    names = ("proximity: corr(cos(c, W_U), log p)", "cos(c, W_U) of the chosen token")
    assert [trace.name for trace in figure.data] == [*names]
    for trace, values in zip(figure.data, (walk.proximity, walk.chosen_cosine), strict=True):
        assert list(trace.x) == [1, 2, 3]
        columns = [column[~column.isnan()] for column in values.T]
        same(trace.y, [column.mean() for column in columns])
        same(trace.error_y.array, [column.std(correction=0) for column in columns])
        assert trace.error_y.color == trace.line.color
    assert "n = 8 generated tokens of 3 prompts" in figure.layout.title.subtitle.text
    assert figure.layout.yaxis.zeroline is True


def test_nothing_generated_draws_no_decoding_path(walk):
    assert "decoding" not in figures(dataclasses.replace(walk, proximity=None))


def test_the_findings_state_the_headline_numbers(walk):
    said, found = finding(walk), walk.metrics()
    assert f"The displacement is {found['straightness']:.0%} of the walk's length" in said
    assert f"attention walks {found['aggregate_share']:.0%} of it" in said
    assert f"after {found['arrival_share']:.0%} of the steps" in said
    assert f"keeps {found['redundancy']:.0%} of what attention does" in said
    assert "n = 13 tokens of 3 prompts, the first of each left out" in said
    assert finding(plant.spectrum()) == (
        "Layers by regime: convergent: 33%, mixed: 33%, divergent: 33%; 42% of the eigenvalues of "
        "S_B S_C^T have a positive real part (n = 3 layers)."
    )
    regime = torch.tensor([1, 1, 0])
    uneven = finding(dataclasses.replace(plant.spectrum(), regime=regime))
    assert "convergent: 0%, mixed: 33%, divergent: 67%" in uneven


def test_eigenvalues_stand_at_their_layer_by_sign():
    figure = token_dynamics.figure_eigenvalues(plant.spectrum())
    up, down = figure.data
    assert (up.name, down.name) == ("positive: diverge", "negative: converge")
    assert list(zip(up.x, up.y, strict=True)) == [(0, 0.5), (0, 1), (0, 2), (0, 3), (2, 5)]
    below = [(1, -4), (1, -3), (1, -2), (1, -1), (2, -2), (2, -1), (2, 0)]
    assert list(zip(down.x, down.y, strict=True)) == below  # 0 is not positive
    for trace in (up, down):
        same(trace.customdata, 0.1 * np.asarray(trace.y) + 1)
        assert trace.mode == "markers"
    assert figure.layout.yaxis.zeroline is True
    assert "n = 3 layers of 4 eigenvalues" in figure.layout.title.subtitle.text


def test_signs_are_stacked_for_the_matrix_and_its_symmetric_part():
    figure = token_dynamics.figure_signs(plant.spectrum())
    found = [(bar.name, place(bar), list(bar.y)) for bar in figure.data]
    assert found == [
        ("positive", 1, [4, 0, 1]),
        ("negative", 1, [0, 4, 2]),
        ("positive", 2, [3, 1, 2]),
        ("negative", 2, [1, 2, 2]),
    ]
    for bar in figure.data:
        assert list(bar.x) == [0, 1, 2]
        assert list(bar.customdata) == ["divergent", "convergent", "mixed"]
    # The colours are those of the eigenvalues' figure.
    assert [bar.marker.color for bar in figure.data[:2]] == [SERIES[1], SERIES[0]]
    assert figure.layout.barmode == "stack"
    headings = [note.text for note in figure.layout.annotations]
    assert headings == [
        "eigenvalues of S_B S_C^T",
        "inertia of the symmetric part of S_C^T S_B",
    ]
    assert {axis.title.text for axis in figure.select_yaxes()} == {"eigenvalues (number)"}


@pytest.mark.parametrize(("system", "ended"), [(0, ""), (1, "; stopped at t = 3.5")])
def test_a_trajectory_has_the_norm_of_every_token_of_one_system(system, ended):
    found = trajectory()
    limit = np.arange(1.0, 5)
    figure = figure_trajectory(found, system, {"a closed form": limit})
    assert [line.name for line in figure.data] == [
        "token 1",
        "token 2",
        "token 3",
        "a closed form",
    ]
    for token, line in enumerate(figure.data[:3]):
        assert list(line.x) == [1, 2, 4]  # time 0 has no place on a logarithmic axis
        same(line.y, found.x[system, 1:, token].norm(dim=-1))
    assert list(figure.data[3].y) == [2, 3, 4]
    assert list(figure.data[3].x) == [1, 2, 4]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert figure.layout.title.subtitle.text.endswith(f"n = 1 system of 3 tokens{ended}")
    assert len(figure_trajectory(found, system).data) == 3
