"""Figures of the Bigram-Backcopy toy draw the record's numbers, each at its step, head and letter."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.figures import bigram_backcopy
from probes.figures.bigram_backcopy import figures, finding, growing_gap, live_theory
from probes.figures.theme import DASHES, SERIES
from tests.probes.figures import plant
from tests.probes.figures.plant import place, same, title_of

ABLATED = ("backcopy_risk_ablated", "bigram_risk_ablated", "resid_peak_ablated")


@pytest.fixture
def run():
    return plant.bigram()


@pytest.fixture
def drawn(run):
    return plant.Drawn(bigram_backcopy, run)


def test_curves_leave_out_step_zero_and_keep_their_names(run, drawn):
    expected = {
        "dormancy": (
            ("attention to the first token", run.sink_attention),
            ("|v W_O| there / rest", run.value_norm_bos / run.value_norm_rest),
            "attention (share), norm (ratio)",
        ),
        "risks": (
            ("backcopy (triggers)", run.backcopy_risk),
            ("bigram (others)", run.bigram_risk),
            "excess risk (nats)",
        ),
    }
    for name, (*lines, unit) in expected.items():
        figure = drawn[name]
        assert title_of(figure, "yaxis") == unit
        for trace, (label, values) in zip(figure.data, lines, strict=True):
            assert trace.name == label
            assert list(trace.x) == [1, 2, 4, 8, 12]
            same(trace.y, values[1:])
            assert trace.mode == "lines+markers"


def test_theory_and_measurement_stand_side_by_side(run, drawn):
    figure = drawn["theory"]
    grown = 0.5 * np.log([1, 2, 4, 8, 12])
    # The last half of five checkpoints are two.
    grown += run.sink_logit_gap[-2:].mean().item() - grown[-2:].mean()
    same(growing_gap(run), grown)
    expected = [
        ("first token", 1, run.sink_logit_gap[1:]),
        ("theory: 1/2 ln t + c", 1, grown),
        ("first token", 2, run.value_norm_bos[1:]),
        ("theory: at rest", 2, run.value_norm_stationary[1:]),
        ("the other tokens", 2, run.value_norm_rest[1:]),
    ]
    looks = [(0, "lines+markers"), (1, "lines"), (0, "lines+markers"), (1, "lines")]
    looks += [(2, "lines+markers")]
    for trace, (name, column, values), (rank, mode) in zip(
        figure.data, expected, looks, strict=True
    ):
        assert (trace.name, place(trace)) == (name, column)
        assert list(trace.x) == [1, 2, 4, 8, 12]
        same(trace.y, values)
        assert (trace.line.color, trace.line.dash) == (SERIES[rank], DASHES[rank])
        assert trace.mode == mode
    assert [trace.showlegend for trace in figure.data] == [True, True, False, True, True]
    assert (title_of(figure, "yaxis"), title_of(figure, "yaxis2")) == (
        "score (nats)",
        "norm (model units)",
    )
    assert figure.layout.yaxis.type is None
    assert figure.layout.yaxis2.type == "log"
    # The axis of norms has numbers for the smallest and the largest of all three lines.
    norms = torch.stack([run.value_norm_bos, run.value_norm_rest, run.value_norm_stationary])
    ticks = figure.layout.yaxis2.tickvals
    assert min(ticks) < 3 * norms[:, 1:].min()
    assert max(ticks) > norms[:, 1:].max() / 3


def test_one_checkpoint_has_a_theory_through_it(run):
    parts = {
        field.name: values[:2]
        for field in dataclasses.fields(run)
        if isinstance(values := getattr(run, field.name), torch.Tensor) and len(values) == 6
    }
    parts |= {name: values[:, :2] for name in ABLATED for values in [getattr(run, name)]}
    short = dataclasses.replace(run, **parts)
    same(growing_gap(short), run.sink_logit_gap[1:2])


def test_a_run_that_still_trains_has_its_theory():
    curves = {
        "sink_logit_gap": ([0.0, 1.0, 2.0, 4.0], [9.0, 0.1, 0.5, 0.9]),
        "backcopy_risk": ([0.0, 5.0], [3.0, 2.0]),
        "loss": ([0.0], [1.0]),
    }
    found = live_theory(curves)
    assert {*found} == {"sink_logit_gap", "backcopy_risk"}
    name, (steps, values) = found["sink_logit_gap"]
    assert name == "theory: 1/2 ln t + c"
    assert steps == [1, 2, 4]
    grown = 0.5 * np.log([1, 2, 4])
    same(values, grown + 0.7 - grown[1:].mean())
    assert found["backcopy_risk"] == ("theory: the oracle", ([0.0, 5.0], [0.0, 0.0]))
    assert live_theory({"sink_logit_gap": ([0.0, 1.0], [0.0, 1.0])}) == {}
    both = live_theory({"sink_logit_gap": ([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])})
    assert both["sink_logit_gap"][1][0] == [1, 2]


# Parts


def test_patterns_are_those_of_the_head_with_the_strongest_sink(run, drawn):
    figure = drawn["patterns"]
    layer, head = np.unravel_index(run.sink_attention_by_head[-1].numpy().argmax(), (2, 2))
    assert figure.layout.title.text.startswith(f"Head L{layer}H{head} ")
    assert [note.text for note in figure.layout.annotations] == ["step 1", "step 4", "step 12"]
    letters = ["␣", "⏎", "a", "b", "&lt;", "c", "d"]
    for index, heatmap in enumerate(figure.data):
        assert place(heatmap) == index + 1
        seen = torch.full((32, 32), torch.nan)
        for query in range(32):
            seen[query, : query + 1] = run.pattern[index, layer, head, query, : query + 1]
        same(heatmap.z, seen)
        assert heatmap.customdata[9][3] == f"{letters[2]} attends to {letters[3]}"
        assert heatmap.coloraxis == "coloraxis"
    # Letters 2 and 5 of seven are triggers.
    marked = [pos for pos in range(32) if pos % 7 in (2, 5)]
    for axis in figure.select_yaxes():
        assert list(axis.tickvals) == marked
        assert tuple(axis.range) == (31.5, -0.5)
    assert title_of(figure, "yaxis") == "query (position; ticks: triggers)"
    assert {axis.title.text for axis in figure.select_xaxes()} == {"key (position)"}
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (0.0, 1.0)
    assert scale.colorbar.title.text == "attention (share)"
    assert [axis.matches for axis in figure.select_yaxes()] == [None, "y", "y"]


def test_a_kernel_without_an_upper_bound_has_none_on_the_scale():
    figure = bigram_backcopy.figure_patterns(plant.bigram(attention="sigmoid"))
    assert figure.layout.coloraxis.cmax is None


def test_sink_logits_are_by_letter_the_most_frequent_first(run, drawn):
    figure = drawn["sink_logits"]
    # By share: 0 (0.3), 4 (0.15), 6 (0.1495), 1 (0.1); 3 is rare, 2 and 5 are triggers.
    order = [0, 4, 6, 1]
    assert [trace.name for trace in figure.data] == ["step 1", "step 4", "step 12"]
    for trace, checkpoint in zip(figure.data, (1, 3, 5), strict=True):
        assert list(trace.x) == ["␣", "&lt;", "d", "⏎"]
        same(trace.y, run.sink_logit_gap_by_token[checkpoint, order])
        assert trace.line.width == 1
    ours, others = run.sink_logit_spread_by_layer[-1], run.other_logit_spread_by_layer[-1]
    words = ", ".join(f"layer {row} {ours[row]:.1f} ({others[row]:.1f})" for row in range(2))
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert f"(in brackets: other scores) {words};" in said
    assert "characters of at least 0.1% of the text" in said
    axis = figure.layout.xaxis
    assert (axis.type, axis.dtick, axis.tickangle) == ("category", 1, 0)
    # A character of just that share is shown.
    kept = dataclasses.replace(run, unigram=run.unigram.clone())
    kept.unigram[3] = 1e-3
    assert "b" in bigram_backcopy.figure_sink_logits(kept).data[0].x


def test_ablations_have_a_bar_a_part_and_its_number_behind_it(run, drawn):
    figure = drawn["ablations"]
    ratio = run.resid_norm_bos_by_depth[-1] / run.resid_norm_rest_by_depth[-1]
    panels = (
        ("backcopy risk (nats)", run.backcopy_risk[-1], run.backcopy_risk_ablated),
        ("bigram risk (nats)", run.bigram_risk[-1], run.bigram_risk_ablated),
        ("residual peak (ratio)", ratio[1:].max(), run.resid_peak_ablated),
    )
    for index, (bars, (unit, whole, ablated)) in enumerate(zip(figure.data, panels, strict=True)):
        values = [whole.item(), *ablated[:, -1].tolist()]
        same(bars.x, values)
        assert list(bars.y) == ["nothing taken away", *run.labels["ablation"]]
        assert list(bars.text) == [f"{value:.3g}" for value in values]
        axis = figure.layout[f"xaxis{index + 1 if index else ''}"]
        assert axis.title.text == unit
        assert axis.range[0] == 0
        # Room for the number behind the longest bar.
        assert 1.1 * max(values) < axis.range[1] < 1.5 * max(values)
        assert (bars.orientation, bars.textposition) == ("h", "outside")
        assert bars.cliponaxis is False
        assert bars.showlegend is False
        assert place(bars) == index + 1
    assert len({bars.marker.color for bars in figure.data}) == 3
    assert title_of(figure, "yaxis") == "taken away (part)"
    assert {axis.autorange for axis in figure.select_yaxes()} == {"reversed"}
    more = dataclasses.replace(
        run,
        labels=run.labels | {"ablation": (*run.labels["ablation"], "head:1")},
        **{name: torch.cat([getattr(run, name), torch.zeros(1, 6)]) for name in ABLATED},
    )
    grown = bigram_backcopy.figure_ablations(more).layout.height - figure.layout.height
    assert 12 < grown < 40


def test_n_names_the_run(run, drawn):
    text = (
        "n = 3 held-out sequences of 40 tokens, 1 run of 12 steps (seed 0, n_layers 2, softmax "
        "attention, adamw lr 0.003)"
    )
    for figure in figures(run).values():
        assert figure.layout.title.subtitle.text.replace("<br>", " ").endswith(text)


def test_the_finding_is_about_the_end_of_training(run):
    drain = run.value_norm_bos[-1] / run.value_norm_rest[-1]
    worst = max(run.backcopy_risk_ablated[row, -1] for row in (0, 2))
    peak = run.resid_norm_bos[-1] / run.resid_norm_rest[-1]
    rows = run.resid_peak_ablated[:4, -1]  # without parts, not without single heads
    assert finding(run) == (
        f"{run.sink_attention[-1]:.0%} of the attention of queries that are no triggers goes to the "
        f"first token, whose |v W_O| is {drain:.2f} times the others'; without attention the backcopy "
        f"risk is {worst:.2f} nats instead of {run.backcopy_risk[-1]:.3f}; its residual norm is "
        f"{peak:.2f} times the others', and falls most with "
        f"{run.labels['ablation'][int(rows.argmin())]} (step 12, seed 0)."
    )
