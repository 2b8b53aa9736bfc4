"""Figures of the other toys' records: scan-snap, its sweep, its run on text, the state-space toy."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import scan_snap, scan_snap_sweep, scan_snap_text, state_space
from probes.figures.scan_snap import figure_attention
from probes.figures.theme import DASHES, INK, SERIES
from tests.probes.figures import plant
from tests.probes.figures.plant import named, place, same, title_of
from toy_tasks.scan_snap_theory import distinct_logits, dominant_invariant
from toy_tasks.state_space import VARIANTS

# Scan and snap


@pytest.fixture(scope="module")
def snap():
    return plant.snap()


def test_loss_attention_and_entropy_are_three_panels(snap):
    figure = scan_snap.figure_scan_and_snap(snap)
    common = snap.attention[:, :, :3].sum(dim=-1).mean(dim=-1)
    panels = (
        ("loss (nats)", "loss", snap.loss),
        ("on common tokens (share)", "on common tokens", common),
        ("entropy (nats)", "entropy", snap.entropy),
    )
    shown = np.asarray(figure.data[0].x)
    assert len(shown) < len(snap.step) == 201
    assert {0, 1, 200} <= {*shown}
    for index, (trace, (name, heading, values)) in enumerate(zip(figure.data, panels, strict=True)):
        assert (trace.name, place(trace)) == (name, index + 1)
        same(trace.y, values[shown])
        assert list(trace.x) == list(shown)
        assert trace.line.color == SERIES[index]
        assert trace.showlegend is False
        assert figure.layout.annotations[index].text == heading
        axis = f"axis{index + 1 if index else ''}"
        assert title_of(figure, "y" + axis) == name
        assert title_of(figure, "x" + axis) == "updates (steps)"
        line = figure.layout.shapes[index]
        assert (line.x0, line.x1, line.xref) == (13, 13, trace.xaxis)
        assert line.line.color == INK
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type is None
    first = scan_snap.figure_scan_and_snap(dataclasses.replace(snap, snap_step=torch.tensor(0)))
    assert [line.x0 for line in first.layout.shapes] == [0, 0, 0]


def test_the_map_of_attention_has_the_tokens_of_one_class_in_order(snap):
    figure = figure_attention(snap, 2)
    [heatmap] = figure.data
    own = [0, 1, 2, *range(3 + 2 * 4, 3 + 3 * 4)]
    names = [f"common {token}" for token in own[:3]] + [f"distinct {token}" for token in own[3:]]
    assert list(heatmap.y) == names
    same(heatmap.z, snap.attention[np.asarray(heatmap.x)][:, 2, own].T)
    assert heatmap.zmin == 0
    assert figure.layout.title.text == "Where the attention of class 2 goes"
    assert figure.layout.yaxis.autorange == "reversed"
    assert title_of(figure) == "updates (steps)"
    assert title_of(figure, "yaxis") == "contextual token (id)"
    assert figure.layout.height == 400
    wide = [figure_attention(plant.snap(2, n_distinct=n)).layout.height for n in (20, 21, 90)]
    assert wide[1] - wide[0] >= 10
    assert wide[2] == 760


def test_distinct_tokens_are_means_over_classes_with_the_theory_of_each_step(snap):
    figure = scan_snap.figure_distinct_tokens(snap)
    # A class draws half from its own tokens; class n has tokens 3 + 4 n and the three after it.
    prob = snap.law().prob[0, 3:7]
    steps = [16, 32, 64, 200]
    for rank, step in enumerate(steps):
        points, theory = figure.data[2 * rank : 2 * rank + 2]
        own = torch.stack([snap.z[step, n // 2, 3 + 4 * n : 7 + 4 * n] for n in range(4)])
        mean = own.double().mean(dim=0)
        same(points.x, prob)
        same(points.y, mean)
        assert (points.name, points.mode) == (f"step {step}", "markers")
        wide = torch.linspace(0, float(prob.max()), len(theory.x)).double()
        same(theory.x, wide)
        same(theory.y, distinct_logits(dominant_invariant(mean, prob), wide))
        assert len(theory.x) > 30
        assert (theory.line.color, theory.line.dash) == (SERIES[rank], DASHES[rank])
        assert points.marker.color == SERIES[rank]
    assert title_of(figure, "yaxis") == "attention logit z (nats)"
    short = scan_snap.figure_distinct_tokens(plant.snap(1))
    assert [trace.name for trace in short.data] == ["step 1", "step 1, theory"]


def test_common_tokens_fall_from_step_one_on(snap):
    figure = scan_snap.figure_common_tokens(snap)
    measured, theory = figure.data
    steps = np.asarray(measured.x)
    assert steps[0] == 1
    fallen = -torch.stack([snap.z[:, n // 2, :3] for n in range(4)]).mean(dim=(0, 2))
    same(measured.y, fallen[steps])
    assert (measured.name, theory.name) == ("measured", "theory")
    assert list(theory.x) == list(steps)
    assert measured.mode == theory.mode == "lines"
    assert theory.line.dash == "dash"
    assert figure.layout.xaxis.type == "log"
    assert title_of(figure, "yaxis") == "fall B = -z (nats)"


def test_the_flow_is_the_closed_form_with_rates_over_one_less_momentum(snap):
    flow = scan_snap.flow_through_end(snap, 0.9)
    config = snap.config
    eta_y = config.lr_z * config.lr_ratio / (1 - config.momentum)
    # B(t) = 1/4 ln(1 + c g(t)) with g the integral of gamma, by the trapezoidal rule.
    times = np.linspace(0, 200, 40_001)
    scaled = eta_y * times / config.n_classes
    late = times >= 2 * config.n_classes * np.log(config.n_tokens) / eta_y
    safe = np.where(late, scaled, 1.0)
    gamma = np.where(late, np.log(config.n_tokens * safe) / safe, scaled)
    total = np.concatenate([[0], np.cumsum((gamma[1:] + gamma[:-1]) / 2)])[::200]
    expected = np.log1p(np.expm1(4 * 0.9) * total / total[-1]) / 4
    np.testing.assert_allclose(flow, expected, atol=2e-3)
    assert np.isfinite(scan_snap.flow_through_end(snap, -0.5)).all()


def test_common_tokens_are_drawn_where_there_are_some_and_two_steps(snap):
    names = ["scan_and_snap", "attention", "distinct_tokens"]
    assert list(scan_snap.figures(plant.snap(2, n_common=2))) == [*names, "common_tokens"]
    assert list(scan_snap.figures(plant.snap(1, n_common=2))) == names
    assert list(scan_snap.figures(plant.snap(2, n_common=0))) == names


def test_findings_of_a_run_have_its_ends_and_its_settings(snap):
    common = snap.attention[:, :, :3].sum(dim=-1).mean(dim=-1)
    slow = dataclasses.replace(snap, config=dataclasses.replace(snap.config, lr_ratio=3.0))
    slow = dataclasses.replace(slow, config=dataclasses.replace(slow.config, lr_z=0.5))
    assert scan_snap.finding(slow) == (
        f"attention on common tokens went from {common[0]:.0%} to {common[-1]:.0%}, its entropy among "
        f"distinct tokens from {snap.entropy[0]:.3f} to {snap.entropy[-1]:.3f} nats; attention froze at "
        "step 13 (4 classes, 2 queries, 25 tokens, rates 0.5 of Z and 1.5 of Y)."
    )
    assert "froze at step 0" in scan_snap.finding(plant.snap(2, 0))
    assert scan_snap.n_text(slow).startswith(
        "n = 1 run (seed 2) of 200 steps of 128 sequences of 128 tokens; 4 classes"
    )


# The sweep


def test_panels_of_the_sweep_are_means_with_errors_on_one_scale():
    result = plant.sweep()
    drawn = scan_snap_sweep.figures(result)
    entropy, common = drawn["entropy"], drawn["common_mass"]
    finite = result.entropy.mean(dim=-1)
    kept = finite[~finite.isnan()]
    for index, panel in enumerate(entropy.data):
        same(panel.z, finite[index])
        one, other = result.entropy[index].unbind(dim=-1)
        # Where no run was left there is no error either.
        same(panel.customdata, ((one - other).abs() / 2).nan_to_num())
        assert panel.zmin == pytest.approx(kept.min().item())
        assert panel.zmax == pytest.approx(kept.max().item())
        assert place(panel) == index + 1
        assert panel.reversescale is True
        assert "+- %{customdata:.3f}" in panel.hovertemplate
    for index, panel in enumerate(common.data):
        same(panel.z, result.common_mass[index].mean(dim=-1))
        same(panel.customdata, np.zeros((2, 3)))
        assert "+-" not in panel.hovertemplate
    for figure, name in ((entropy, "entropy (nats)"), (common, "on common tokens (share)")):
        assert [panel.showscale for panel in figure.data] == [False, True]
        assert {panel.colorbar.title.text for panel in figure.data} == {name}
        assert [axis.title.text for axis in figure.select_yaxes()] == ["eta_Z (rate)", None]
        assert {axis.type for axis in figure.select_yaxes()} == {"category"}
        assert {axis.type for axis in figure.select_xaxes()} == {"category"}
        assert {axis.title.text for axis in figure.select_xaxes()} == {"eta_Y / eta_Z (ratio)"}
        assert [axis.matches for axis in figure.select_yaxes()] == [None, "y"]
        assert [note.text for note in figure.layout.annotations] == ["1 query", "3 queries"]
        text = figure.layout.title.subtitle.text
        assert "n = 2 runs a cell (seeds 4 to 5)" in text


def test_a_sweep_that_diverged_everywhere_has_empty_panels():
    result = plant.sweep()
    result.entropy[:] = torch.nan
    result.diverged_at[:] = 3
    [first, _] = scan_snap_sweep.figures(result)["entropy"].data
    assert (first.zmin, first.zmax) == (0.0, 1.0)
    assert "24 diverged" in scan_snap_sweep.finding(result)


# On text


def test_text_has_a_line_a_layer_in_three_panels_and_both_losses():
    result = plant.snap_text()
    [(name, figure)] = scan_snap_text.figures(result).items()
    assert name == "attention"
    panels = (result.entropy, result.change, result.common_ratio)
    for index, values in enumerate(panels):
        for layer in range(2):
            line = named(figure, f"layer {layer}", index)
            assert place(line) == index + 1
            assert list(line.x) == [1, 2, 3, 5, 8]
            same(line.y, values[:, layer])
            assert line.mode == "lines+markers"
            assert line.showlegend is (index == 0)
    for name, values, dash in (
        ("held-out", result.loss, "solid"),
        ("training text", result.train_loss, "dot"),
    ):
        line = named(figure, name)
        assert (place(line), list(line.x), line.line.dash) == (4, [1, 2, 3, 5, 8], dash)
        same(line.y, values)
    titles = [axis.title.text for axis in figure.select_yaxes()]
    assert titles == [
        "entropy over even (share)",
        "moved since before (share)",
        "on common words (ratio)",
        "loss (nats a word)",
    ]
    assert [note.text for note in figure.layout.annotations] == [
        "entropy of attention",
        "change between checkpoints",
        "common words",
        "loss",
    ]
    for axis in figure.select_xaxes():
        assert (axis.type, axis.dtick, axis.title.text) == ("log", 1, "updates + 1 (steps)")
    assert {axis.rangemode for axis in figure.select_yaxes()} == {"tozero"}
    assert scan_snap_text.finding(result) == (
        f"the entropy of the first layer's attention went from {result.entropy[0, 0]:.2f} to "
        f"{result.entropy[-1, 0]:.2f} of that of even attention, its largest weight from "
        f"{result.top_attention[0, 0]:.2f} to {result.top_attention[-1, 0]:.2f}; from one checkpoint to "
        f"the next it moved by {result.change[1:, 0].max():.2f} at most and by "
        f"{result.change[-1, 0]:.3f} at the end (7 steps, seed 0)."
    )


# State space


def test_learning_and_norms_have_a_line_a_variant_in_both_panels():
    result = plant.state_space()
    drawn = state_space.figures(result)
    assert list(drawn) == ["learning", "token_norms"]
    ratio = result.token_norm / result.token_norm[..., :1]
    contents = {
        "learning": ([0, 10, 20, 30], (result.accuracy, result.loss)),
        "token_norms": ([0, 1, 2], (ratio[:, 0], ratio[:, -1])),
    }
    for name, (x, panels) in contents.items():
        for column, values in enumerate(panels):
            for row, variant in enumerate(VARIANTS):
                line = named(drawn[name], variant, column)
                assert (place(line), list(line.x)) == (column + 1, x)
                same(line.y, values[row])
                assert line.showlegend is (column == 0)
    learning, norms = drawn["learning"], drawn["token_norms"]
    [guess] = learning.layout.shapes
    assert (guess.y0, guess.y1, guess.yref) == (1 / 8, 1 / 8, "y")
    assert guess.line.color == INK
    assert [note.text for note in learning.layout.annotations] == ["accuracy", "loss"]
    assert [note.text for note in norms.layout.annotations] == [
        "before training",
        "after training",
    ]
    assert title_of(learning, "yaxis") == "accuracy (share of sequences)"
    assert title_of(learning, "yaxis2") == "loss (nats)"
    assert learning.layout.yaxis2.rangemode == "tozero"
    assert {axis.title.text for axis in learning.select_xaxes()} == {"updates (steps)"}
    for index, axis in enumerate(norms.select_yaxes()):
        shown = ratio[:, (0, -1)[index]]
        assert axis.type == "log"
        # The numbers on the axis are those of its own panel.
        assert shown.min() / 1.1 <= min(axis.tickvals) <= max(axis.tickvals) <= 1.1 * shown.max()


def test_the_state_space_finding_says_when_half_was_learnt():
    result = plant.state_space()
    steps = ["never", *(f"{(30, 20, 10)[row % 3]}" for row in range(len(VARIANTS) - 1))]
    when = ", ".join(f"{name} {step}" for name, step in zip(VARIANTS, steps, strict=True))
    assert state_space.finding(result) == (
        f"Half of the sequences are read rightly from step: {when} (one seed, n = 512)."
    )
