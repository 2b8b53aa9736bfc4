"""Figures of token-dynamics in state-space models: the spectrum of every layer."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.figures.theme import BESIDE, INK, NARROW, SERIES, tick_step, titled
from probes.token_dynamics_results import StateSpaceResult


def figure_eigenvalues(result: StateSpaceResult) -> go.Figure:
    """The spectrum of every layer: the real parts say which way tokens move."""
    real, imaginary = result.eigenvalues.unbind(dim=-1)
    n_layers, n_states = real.shape
    layer = np.repeat(np.arange(n_layers), n_states)
    values = np.asarray(real).flatten()
    figure = go.Figure()
    for name, keep, color, symbol in (
        ("positive: diverge", values > 0, SERIES[1], "triangle-up"),
        ("negative: converge", values <= 0, SERIES[0], "triangle-down"),
    ):
        figure.add_scatter(
            x=layer[keep],
            y=values[keep],
            customdata=np.asarray(imaginary).flatten()[keep],
            mode="markers",
            name=name,
            marker={"color": color, "symbol": symbol},
            hovertemplate="layer %{x}<br>%{y:.4g} %{customdata:+.4g} i<extra></extra>",
        )
    figure.update_xaxes(title="layer (index)", dtick=tick_step(n_layers))
    figure.update_yaxes(
        title="real part of the eigenvalue (weight units)", zeroline=True, zerolinecolor=INK
    )
    return titled(
        figure,
        "Eigenvalues of S_B S_C^T",
        "those of S_C^T S_B that are not 0; in the theory, tokens converge to 0 where all are "
        "negative and diverge where one is positive",
        f"n = {n_layers} layers of {n_states} eigenvalues",
    )


def figure_signs(result: StateSpaceResult) -> go.Figure:
    """How many eigenvalues have each sign, of S_B S_C^T and of the symmetric part."""
    titles = ["eigenvalues of S_B S_C^T", "inertia of the symmetric part of S_C^T S_B"]
    counts = (
        (result.n_positive, result.n_negative),
        (result.symmetric_positive, result.symmetric_negative),
    )
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=BESIDE)
    names = result.labels["regime"]
    for column, pair in enumerate(counts, start=1):
        for rank, (sign, count) in enumerate(zip(("positive", "negative"), pair, strict=True)):
            figure.add_bar(
                x=np.arange(len(count)),
                y=np.asarray(count),
                name=sign,
                legendgroup=sign,
                showlegend=column == 1,
                customdata=names,
                marker={"color": SERIES[1 - rank], "pattern_shape": ("", "/")[rank]},
                hovertemplate=f"layer %{{x}} (%{{customdata}})<br>%{{y}} {sign}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="layer (index)", dtick=tick_step(len(names), NARROW))
    figure.update_yaxes(title="eigenvalues (number)")
    return titled(
        figure,
        "Signs of the spectrum",
        "convergent: only negative, divergent: only positive, else mixed; S_C^T S_B is not "
        "symmetric, and its symmetric part has eigenvalues of both signs unless it is built not to",
        f"n = {len(names)} layers",
    )
