"""Figures of token-dynamics: what is drawn is what was measured."""

import numpy as np
import pytest
import torch

import workbench as wb
from probes.figures.token_dynamics import figures, finding
from probes.figures.token_dynamics_simulation import figure_trajectory
from probes.figures.token_dynamics_sources import figure_sources
from probes.state_space_dynamics import log_times, one_dimensional, simulate
from probes.token_dynamics import TokenDynamicsConfig, measure_token_dynamics
from tests.zoo import padded, random_tokens, tiny_model
from workbench.context import Context


@pytest.fixture(scope="module")
def result():
    tokens, mask = padded(random_tokens(3, 10), [10, 7, 5], "right")
    config = TokenDynamicsConfig(new_tokens=3, queries=(-1, 2))
    context = Context(attention_mask=mask)
    return measure_token_dynamics(wb.wrap(tiny_model("gpt2")), tokens, config, context)


@pytest.fixture(scope="module")
def spectrum():
    config = TokenDynamicsConfig(mode="state-space")
    none = torch.zeros(0, 0, dtype=torch.long)
    return measure_token_dynamics(wb.wrap(tiny_model("mamba")), none, config)


def test_every_figure_of_a_walk_says_n_and_names_its_axes(result):
    drawn = figures(result)
    assert set(drawn) == {"steps", "arrival", "angles", "association", "sources", "decoding"}
    for figure in drawn.values():
        assert "n = " in figure.layout.title.subtitle.text
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
    # 9 + 6 + 4 tokens: the first of each prompt is left out.
    assert "n = 19 tokens of 3 prompts" in drawn["steps"].layout.title.subtitle.text


def test_steps_are_medians_over_tokens(result):
    bars = figures(result)["steps"].data
    norms = torch.cat([result.step_norm[i, 1:n] for i, n in enumerate((10, 7, 5))])
    expected = np.median(np.asarray(norms), axis=0)
    np.testing.assert_allclose(bars[0].y, expected[::2], rtol=1e-6)
    np.testing.assert_allclose(bars[1].y, expected[1::2], rtol=1e-6)


def test_sources_end_at_the_query(result):
    shown = figure_sources(result, prompt=1).data[0]
    assert list(shown.x) == list(range(7))
    np.testing.assert_allclose(shown.z, result.attribution_share[1, 0, :, :7], rtol=1e-6)
    assert list(figure_sources(result, prompt=1, query=1).data[0].x) == [0, 1, 2]


def test_arrived_tokens_only_grow_in_number(result):
    arrived = next(t for t in figures(result)["arrival"].data if t.name == "has arrived for good")
    assert (np.diff(arrived.y) >= 0).all()
    assert arrived.y[-1] == 1.0


def test_eigenvalues_are_split_by_sign(spectrum):
    drawn = figures(spectrum)
    up, down = drawn["eigenvalues"].data
    assert (np.asarray(up.y) > 0).all()
    assert (np.asarray(down.y) <= 0).all()
    assert len(up.y) + len(down.y) == spectrum.eigenvalues[..., 0].numel()
    bars = drawn["signs"].data
    assert list(bars[0].y) == spectrum.n_positive.tolist()
    assert list(bars[3].y) == spectrum.symmetric_negative.tolist()


def test_findings_name_the_numbers(result, spectrum):
    assert f"{result.metrics()['straightness']:.0%}" in finding(result)
    assert "mixed: 100%" in finding(spectrum)


def test_a_trajectory_is_drawn_with_its_limit():
    one = torch.ones(1)
    time = log_times(10.0, 5)
    found = simulate(one_dimensional(-one, one, one), torch.ones(1, 2, 1).double(), time)
    figure = figure_trajectory(found, limits={"1/sqrt(t)": 1 / np.sqrt(np.asarray(time) + 1e-9)})
    assert [trace.name for trace in figure.data] == ["token 1", "token 2", "1/sqrt(t)"]
    np.testing.assert_allclose(figure.data[1].y, found.x[0, 1:, 1, 0].abs())
