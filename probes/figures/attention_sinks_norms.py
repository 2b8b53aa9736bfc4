"""Figures of the attention-sinks probe: norms along depth and along the prompt."""

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from probes.attention_sinks_results import AttentionSinkResult
from probes.figures.lines import line_style, position_axis
from probes.figures.sink_numbers import (
    drawn_text,
    mean_elsewhere,
    n_text,
    norm_ratios,
    prompt_lengths,
    to_numpy,
)
from probes.figures.theme import (
    BELOW,
    BESIDE,
    DASHES,
    NARROW,
    SERIES,
    TALL,
    choose_positions,
    log_axis,
    tick_step,
    titled,
)


def figure_norms(result: AttentionSinkResult) -> go.Figure:
    """Residual, key, value and output norms along depth: the judged position against the rest."""
    pos = result.config.position
    panels = {
        "residual |h|": result.resid_norm,
        "key |k|": result.key_norm.mean(dim=1),
        "value |v|": result.value_norm.mean(dim=1),
        "output |v W_O|": result.ov_norm.mean(dim=1),
    }
    figure = make_subplots(
        2, 2, subplot_titles=list(panels), vertical_spacing=BELOW, horizontal_spacing=BESIDE
    )
    for index, norm in enumerate(panels.values()):
        row, col = index // 2 + 1, index % 2 + 1
        for line in _norm_lines(norm, pos, showlegend=index == 0):
            figure.add_trace(line, row=row, col=col)
        depth = "blocks passed (0: entry)" if index == 0 else "layer (index)"
        figure.update_xaxes(title=depth, dtick=tick_step(len(norm), NARROW), row=row, col=col)
        heights = np.stack([to_numpy(norm[:, pos]), mean_elsewhere(norm, pos)])
        figure.update_yaxes(log_axis(heights), row=row, col=col)
    figure.update_yaxes(title="L2 norm (model units)")
    return titled(
        figure.update_layout(height=TALL),
        f"Norms at position {pos} against the other positions",
        "means over prompts, and over heads for key, value and output; the residual stream is read "
        "at the entry and after each block, before the final norm",
        n_text(result),
    )


def figure_norms_by_position(result: AttentionSinkResult, *, log_x: bool = False) -> go.Figure:
    """The norms along the prompt, each over its own mean elsewhere, so that one axis holds all.

    Args:
        result: What the probe found.
        log_x: Spread the beginning; the axis is then position + 1.
    """
    pos = result.config.position
    shown = choose_positions(int(prompt_lengths(result).max()), [pos])
    x = (shown + int(log_x)).astype(np.float32)
    ratios = norm_ratios(result)
    figure = go.Figure()
    for rank, (name, ratio) in enumerate(ratios.items()):
        figure.add_scatter(
            x=x,
            y=ratio[shown],
            customdata=shown,
            mode="lines",
            name=name,
            line=line_style(SERIES[rank], DASHES[rank]),
            hovertemplate=f"{name}<br>position %{{customdata}}<br>%{{y:.3g}} times its mean "
            "elsewhere<extra></extra>",
        )
    position_axis(figure, x, log_x=log_x)
    heights = np.stack([ratio[shown] for ratio in ratios.values()])
    figure.update_yaxes(log_axis(heights), title="norm over its mean elsewhere (ratio)")
    return titled(
        figure,
        "Norms along the prompt",
        f"L2 norm at each position over its mean at all positions but {pos}; means over prompts, "
        "layers and heads; the residual stream at the depth where it stands out most",
        n_text(result) + drawn_text(shown, result),
    )


def _norm_lines(
    norm: Float[Tensor, "depth pos"], pos: int, *, showlegend: bool
) -> Iterator[go.Scatter]:
    depth = np.arange(len(norm))
    rows = (
        (f"position {pos}", norm[:, pos], SERIES[1], "solid", "circle"),
        ("mean elsewhere", mean_elsewhere(norm, pos), SERIES[0], "dash", "square"),
    )
    for name, values, color, dash, symbol in rows:
        yield go.Scatter(
            x=depth,
            y=np.asarray(values),
            name=name,
            mode="lines+markers",
            line=line_style(color, dash),
            marker_symbol=symbol,
            legendgroup=name,
            showlegend=showlegend,
            hovertemplate="depth %{x}<br>" + name + ": %{y:.4g}<extra></extra>",
        )
