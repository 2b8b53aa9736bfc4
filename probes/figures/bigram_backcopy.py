"""Figures of the Bigram-Backcopy toy: how a head turns active on triggers and dormant elsewhere."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from probes.figures.bigram_backcopy_parts import (
    figure_ablations,
    figure_patterns,
    figure_sink_logits,
    n_text,
)
from probes.figures.lines import line_style
from probes.figures.theme import BESIDE, DASHES, SERIES, log_axis, titled
from toy_tasks.bigram_backcopy import BigramBackcopyResult

FIT = 0.5
"""Share of the checkpoints, the last ones, through whose mean the 1/2 ln t curve goes."""


def figures(result: BigramBackcopyResult) -> dict[str, go.Figure]:
    """All figures of one run."""
    return {
        "dormancy": figure_dormancy(result),
        "risks": figure_risks(result),
        "theory": figure_theory(result),
        "patterns": figure_patterns(result),
        "sink_logits": figure_sink_logits(result),
        "ablations": figure_ablations(result),
    }


def finding(result: BigramBackcopyResult) -> str:
    """What the run says, in one sentence."""
    found = result.metrics()
    return (
        f"{found['sink_attention']:.0%} of the attention of queries that are no triggers goes to the "
        f"first token, whose |v W_O| is {found['value_drain']:.2f} times the others'; without attention "
        f"the backcopy risk is {found['backcopy_risk_no_attention']:.2f} nats instead of "
        f"{found['backcopy_risk']:.3f}; its residual norm is {found['resid_peak_ratio']:.2f} times the "
        f"others', and falls most with {result.peak_maker()} "
        f"(step {int(result.step[-1])}, seed {result.config.seed})."
    )


def figure_dormancy(result: BigramBackcopyResult) -> go.Figure:
    """Sink attention and value drain along training."""
    drain = result.value_norm_bos / result.value_norm_rest
    lines = {"attention to the first token": result.sink_attention, "|v W_O| there / rest": drain}
    return _curves(result, lines, "The head falls dormant", "attention (share), norm (ratio)")


def figure_risks(result: BigramBackcopyResult) -> go.Figure:
    """Excess risk on triggers and elsewhere along training."""
    lines = {"backcopy (triggers)": result.backcopy_risk, "bigram (others)": result.bigram_risk}
    return _curves(result, lines, "What is learned when", "excess risk (nats)")


def _curves(
    result: BigramBackcopyResult, lines: dict[str, Tensor], title: str, unit: str
) -> go.Figure:
    figure = go.Figure()
    # Step 0 has no place on a logarithmic axis.
    for rank, (name, values) in enumerate(lines.items()):
        figure.add_scatter(
            x=result.step[1:].tolist(),
            y=values[1:].tolist(),
            name=name,
            mode="lines+markers",
            line=line_style(SERIES[rank], DASHES[rank]),
        )
    figure.update_xaxes(log_axis(result.step[1:].double().numpy()), title_text="updates (steps)")
    figure.update_yaxes(title_text=unit)
    return titled(
        figure, title, "means over held-out sequences, position 0 excluded", n_text(result)
    )


def growing_gap(result: BigramBackcopyResult) -> Float[np.ndarray, " checkpoint"]:
    """1/2 ln(step) + c from step 1 on, c such that it has the mean of the last checkpoints."""
    return _grown(result.step[1:].double().numpy(), result.sink_logit_gap[1:].double().numpy())


def _grown(
    step: Float[np.ndarray, " checkpoint"], gap: Float[np.ndarray, " checkpoint"]
) -> Float[np.ndarray, " checkpoint"]:
    grown = 0.5 * np.log(step)
    last = slice(-max(1, round(FIT * len(step))), None)
    return np.asarray(grown + (gap - grown)[last].mean())


Curve = tuple[list[float], list[float]]
"""Steps, and a number at each."""


def live_theory(curves: Mapping[str, Curve]) -> dict[str, tuple[str, Curve]]:
    """What theory says of the curves of a run that still trains: by curve, its name and its values.

    The sink logit's constant is fitted to the run so far; the oracle, which knows the law, has no
    excess risk.
    """
    found: dict[str, tuple[str, Curve]] = {}
    steps, gap = curves.get("sink_logit_gap", ([], []))
    later = [(step, value) for step, value in zip(steps, gap, strict=True) if step >= 1]
    if len(later) > 1:
        at, values = np.array(later, dtype=float).T
        line = (at.tolist(), _grown(at, values).tolist())
        found["sink_logit_gap"] = ("theory: 1/2 ln t + c", line)
    for name in ("backcopy_risk", "bigram_risk"):
        if name in curves:
            steps = curves[name][0]
            found[name] = ("theory: the oracle", (steps, [0.0] * len(steps)))
    return found


def figure_theory(result: BigramBackcopyResult) -> go.Figure:
    """Sink logit and value norm along training, with what the simplified model's flow does."""
    figure = make_subplots(
        1, 2, subplot_titles=["sink logit gap", "value norm |v W_O|"], horizontal_spacing=BESIDE
    )
    step = result.step[1:].tolist()
    first, theory, others = (
        {"mode": mode, "line": line_style(color, dash)}
        for mode, color, dash in (
            ("lines+markers", SERIES[0], "solid"),
            ("lines", SERIES[1], "dash"),
            ("lines+markers", SERIES[2], "dot"),
        )
    )
    gap, grown = result.sink_logit_gap[1:].tolist(), growing_gap(result)
    bos, rest = result.value_norm_bos[1:], result.value_norm_rest[1:]
    curves = [
        (1, "first token", gap, first),
        (1, "theory: 1/2 ln t + c", grown, theory),
        (2, "first token", bos.tolist(), first),
        (2, "theory: at rest", result.value_norm_stationary[1:].tolist(), theory),
        (2, "the other tokens", rest.tolist(), others),
    ]
    for column, name, y, style in curves:
        listed = (column, name) != (2, "first token")
        line = go.Scatter(x=step, y=y, name=name, legendgroup=name, showlegend=listed, **style)
        figure.add_trace(line, row=1, col=column)
    figure.update_xaxes(log_axis(np.asarray(step, dtype=float)), title_text="updates (steps)")
    figure.update_yaxes(title_text="score (nats)", row=1, col=1)
    norms = np.concatenate([bos.numpy(), rest.numpy(), result.value_norm_stationary[1:].numpy()])
    figure.update_yaxes(log_axis(norms), title_text="norm (model units)", row=1, col=2)
    return titled(
        figure,
        "The sink beside its theory",
        "left: with the value held, gradient flow lets the sink logit grow like 1/2 ln t (c: mean of "
        "the last half); right: with the logits held, the value comes to the norm that cancels what "
        "the other tokens add on average. Training moves both at once, by its own optimiser",
        n_text(result),
    )
