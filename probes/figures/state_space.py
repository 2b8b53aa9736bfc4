"""Figures of the state-space toy: what the refinements do along training and along depth."""

import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.figures.lines import line_style
from probes.figures.theme import (
    BESIDE,
    DASHES,
    INK,
    NARROW,
    SERIES,
    SHARES,
    log_axis,
    tick_step,
    titled,
)
from toy_tasks.state_space import N_TEST, VARIANTS, StateSpaceToyResult


def figures(result: StateSpaceToyResult) -> dict[str, go.Figure]:
    """All figures of one run."""
    return {"learning": figure_learning(result), "token_norms": figure_token_norms(result)}


def finding(result: StateSpaceToyResult) -> str:
    """What the run says, in one sentence."""
    when = ", ".join(
        f"{name} {result.learnt_at(row):.0f}"
        if math.isfinite(result.learnt_at(row))
        else f"{name} never"
        for row, name in enumerate(VARIANTS)
    )
    return f"Half of the sequences are read rightly from step: {when} (one seed, n = {N_TEST})."


def figure_learning(result: StateSpaceToyResult) -> go.Figure:
    """Accuracy and loss of every variant along training."""
    panels = {"accuracy": result.accuracy, "loss": result.loss}
    figure = make_subplots(1, 2, subplot_titles=list(panels), horizontal_spacing=BESIDE)
    for column, values in enumerate(panels.values(), start=1):
        for row, name in enumerate(VARIANTS):
            figure.add_scatter(
                x=np.asarray(result.step),
                y=np.asarray(values[row]),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines",
                line=line_style(SERIES[row], DASHES[row]),
                row=1,
                col=column,
            )
    guess = 1 / result.config.n_classes
    figure.add_hline(guess, line={"color": INK, "dash": "dot"}, row=1, col=1)
    figure.update_xaxes(title="updates (steps)")
    figure.update_yaxes(title="accuracy (share of sequences)", range=SHARES, row=1, col=1)
    figure.update_yaxes(title="loss (nats)", rangemode="tozero", row=1, col=2)
    return titled(
        figure,
        "Learning with and without the refinements",
        "one signal token in the first half of noise, its class read from the last token; positive, "
        "negative, mixed: prescribed signs of the eigenvalues of S_C^T S_B; reordered: a soft sort by "
        "importance before the first scan; dotted: guessing",
        f"n = {N_TEST} fixed sequences, 1 seed ({result.config.seed})",
    )


def figure_token_norms(result: StateSpaceToyResult) -> go.Figure:
    """How token norms change from layer to layer, before and after training."""
    titles = ["before training", "after training"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=BESIDE)
    ratio = np.asarray(result.token_norm / result.token_norm[..., :1])
    for column, checkpoint in enumerate((0, -1), start=1):
        for row, name in enumerate(VARIANTS):
            figure.add_scatter(
                x=np.arange(ratio.shape[-1]),
                y=ratio[row, checkpoint],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line=line_style(SERIES[row], DASHES[row]),
                row=1,
                col=column,
            )
        figure.update_yaxes(log_axis(ratio[:, checkpoint]), row=1, col=column)
    figure.update_xaxes(title="layers passed (number)", dtick=tick_step(ratio.shape[-1], NARROW))
    figure.update_yaxes(title="token norm over its entry (ratio)")
    return titled(
        figure,
        "Token norms along depth",
        "mean over tokens of |x| after each layer over that at the entry; the theory has negative "
        "spectra shrink tokens and positive ones grow them; a sort averages tokens, which shortens them",
        f"n = {N_TEST} sequences of {result.config.n_pos} tokens",
    )
