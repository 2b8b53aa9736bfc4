"""Figures of the active-dormant probe: what is drawn is what was measured."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.active_dormant import ActiveDormantConfig, ActiveDormantResult
from probes.figures.active_dormant import (
    LARGEST,
    SMALLEST,
    figure_domains,
    figure_residual_peak,
    figures,
    figures_over_revisions,
    finding,
    marker_sizes,
)
from probes.figures.active_dormant_emergence import figure_emergence, revision_axis
from probes.figures.active_dormant_heads import figure_head
from workbench.errors import ConfigError


def planted_result(n_domains=2, peak=100.0):
    """Head (0, 1) is dormant in the first domain only, head (1, 2) everywhere."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return 0.2 * torch.rand(*shape, generator=generator)

    heads = (n_domains, 2, 3)
    sink, loss, dormant = noise(*heads), noise(*heads) + 0.02, torch.zeros(heads, dtype=torch.bool)
    sink[0, 0, 1], loss[0, 0, 1], loss[1, 0, 1], dormant[0, 0, 1] = 0.9, 0.0, 0.8, True
    sink[:, 1, 2], loss[:, 1, 2], dormant[:, 1, 2] = 0.95, -0.01, True
    p = torch.full((2, 3), 0.5)
    p[0, 1] = 0.001
    resid = 1.0 + noise(n_domains, 3)
    peaked = resid.clone()
    peaked[:, 2] = peak
    without = torch.full((n_domains, 2, 2), peak)
    without[:, 1, 1] = peak / 10
    tokens = torch.arange(n_domains * 4).view(n_domains, 4)
    tokens[0, 3] = -1
    names = ("prose", "code", "chess", "music")[:n_domains]
    return ActiveDormantResult(
        sink, noise(*heads), noise(*heads), noise(*heads), loss, noise(*heads), noise(*heads),
        noise(*heads), p, p, p, p, dormant, noise(n_domains), peaked, resid, without,
        torch.arange(n_domains) + 4, torch.tensor([[0, 1], [1, 2]]), tokens,
        torch.rand(2, n_domains, 4, 4, generator=generator).tril(),
        {
            "domain": names,
            "part": ("attention", "MLP"),
            "example_token": tuple(f"t{i}" for i in range(n_domains * 4)),
        },
        ActiveDormantConfig(),
    )  # fmt: skip


def test_a_page_a_kept_head_and_a_figure_a_pair_of_domains():
    names = ["domains", "difference", "residual_peak", "head_L0H1", "head_L1H2"]
    assert list(figures(planted_result())) == names
    three = list(figures(planted_result(3)))
    assert [name for name in three if name.startswith("domains_")] == [
        "domains_prose_code",
        "domains_prose_chess",
        "domains_code_chess",
    ]


def test_every_head_is_a_point_of_its_class():
    result = planted_result()
    figure = figure_domains(result)
    points = {trace.name: trace for trace in figure.data if trace.customdata is not None}
    assert list(points) == ["always active (4)", "active-dormant (1)", "always dormant (1)"]
    switching = points["active-dormant (1)"]
    assert (switching.x[0], switching.y[0]) == (
        pytest.approx(0.9),
        pytest.approx(result.sink_attention[1, 0, 1].item()),
    )
    assert switching.customdata[0][:2].tolist() == [0, 1]
    assert switching.marker.size[0] == pytest.approx(LARGEST)  # 0.8 nats in code: the largest
    assert points["always dormant (1)"].marker.size[0] == pytest.approx(SMALLEST)
    text = figure.layout.title.subtitle.text
    assert "n = 4 prompts of prose, 5 prompts of code" in text
    assert "prose" in figure.layout.xaxis.title.text
    assert "code" in figure.layout.yaxis.title.text


def test_areas_grow_with_the_loss():
    size = marker_sizes(np.array([0.0, 0.25, 1.0, -3.0]))
    assert size.tolist() == pytest.approx([SMALLEST, (SMALLEST + LARGEST) / 2, LARGEST, SMALLEST])


def test_the_maker_of_the_peak_has_the_short_bar():
    figure = figure_residual_peak(planted_result())
    bars = {trace.name: list(trace.y) for trace in figure.data if trace.type == "bar"}
    assert bars["attention"] == pytest.approx([1.0, 1.0])
    assert bars["MLP"] == pytest.approx([1.0, 0.1])
    assert "without the MLP of block 1 10% of" in finding(planted_result())
    assert "1 active-dormant, 1 always dormant (L0H1)" in finding(planted_result())


def test_a_model_without_mlp_has_no_bars_for_it():
    result = planted_result()
    without = result.peak_without.clone()
    without[:, 1] = torch.nan
    figure = figure_residual_peak(dataclasses.replace(result, peak_without=without))
    assert [trace.name for trace in figure.data if trace.type == "bar"] == ["attention"]


def test_a_heads_page_shows_its_patterns_with_the_tokens():
    result = planted_result()
    figure = figure_head(result, 1, 2)
    first, second = figure.data
    assert first.z.shape == (3, 3)  # its prompt has three tokens
    assert second.z.shape == (4, 4)
    assert second.z[2, 1] == pytest.approx(result.example_pattern[1, 1, 2, 1].item())
    assert np.isnan(second.z[1, 2])
    assert second.customdata[2][1].tolist() == ["t6", "t5"]
    assert "t0t1t2</i>" in figure.layout.xaxis.title.text  # the prompt, without padding
    titles = [note.text for note in figure.layout.annotations]
    assert "dormant" in titles[0]
    assert "sink 0.95" in titles[0]
    assert "always dormant" in figure.layout.title.text
    with pytest.raises(ConfigError, match="L0H1, L1H2; got L1H0"):
        figure_head(result, 1, 0)


def test_curves_over_revisions():
    results = [planted_result(peak=peak) for peak in (2.0, 50.0, 400.0)]
    figure = figure_emergence(results, ["step0", "step8", "step64"])
    assert [axis.title.text for axis in figure.select_yaxes()] == [
        "gap (nats)",
        "first token over the others (ratio)",
        "L2 norm (model units)",
        "heads (number)",
    ]
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines["first token, 2 blocks passed"].y) == pytest.approx([2.0, 50.0, 400.0])
    assert list(lines["active-dormant"].y) == [1, 1, 1]
    assert list(lines["always dormant"].x) == [1.0, 9.0, 65.0]
    gaps = [trace for trace in figure.data if trace.name == "L1H2"]
    assert list(gaps[0].y) == pytest.approx([results[0].sink_logit_gap[:, 1, 2].mean().item()] * 3)
    assert list(gaps[1].y) == pytest.approx(
        [results[0].value_norm_ratio[:, 1, 2].mean().item()] * 3
    )
    assert list(figures_over_revisions(results, ["a", "b", "c"])) == ["emergence"]


def test_revisions_without_numbers_stand_side_by_side():
    assert revision_axis(["main", "dev"])[0] == ["main", "dev"]
    assert revision_axis(["step8", "step2"])[0] == ["step8", "step2"]
    assert revision_axis(["step2", "step8-tokens1B"])[0] == [3.0, 9.0]


def test_curves_need_results_that_fit():
    with pytest.raises(ConfigError, match="two or more"):
        figure_emergence([planted_result()])
    with pytest.raises(ConfigError, match=r"\[2, 2, 3\], \[3, 2, 3\]"):
        figure_emergence([planted_result(), planted_result(3)])
