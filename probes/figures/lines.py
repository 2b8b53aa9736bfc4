"""Lines, bands and points of heads, shared by the figures of several probes."""

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from probes.figures.heatmap import HeadNumbers
from probes.figures.theme import BAND, DASHES, INK, MARKED, SERIES, head_name, log_axis

STRONGEST = 5
"""Heads that get a line of their own."""


def line_style(color: str, dash: str = "solid", width: float | int = 2) -> dict[str, object]:
    """How a line looks; the dash tells lines apart where colours cannot."""
    return {"color": color, "dash": dash, "width": width}


def reference_line(dash: str) -> dict[str, object]:
    """How a line looks that is no measurement: thin and grey."""
    return line_style(INK, dash, 1)


def position_axis(figure: go.Figure, x: Float[np.ndarray, " shown"], *, log_x: bool) -> None:
    """Title and range of an axis of positions; with ``log_x`` x is the position + 1."""
    # Room left of position 0, where the lines that matter begin.
    axis = log_axis(x) if log_x else {"range": [-0.02 * x[-1], x[-1] + 0.5]}
    figure.update_xaxes(axis, title=f"position{' + 1' if log_x else ''} (tokens)")


def head_lines(
    x: Float[np.ndarray, " shown"],
    position: Int[np.ndarray, " shown"],
    mean: Float[np.ndarray, "layer head shown"],
    strength: Float[np.ndarray, "layer head"],
) -> Iterator[go.Scatter]:
    """The strongest heads as lines, what the others span as a band behind them."""
    n_heads = strength.shape[1]
    order = np.argsort(-strength, axis=None, kind="stable")
    curves = mean.reshape(-1, mean.shape[-1])
    if len(order) > STRONGEST:
        rest = curves[order[STRONGEST:]]
        yield from _band(x, rest, f"the other {len(rest)} heads (least to most)")
    for rank, index in enumerate(order[:STRONGEST]):
        layer, head = divmod(int(index), n_heads)
        yield go.Scatter(
            x=x,
            y=curves[index].astype(np.float32),
            name=head_name(layer, head),
            customdata=position,  # on a logarithmic axis x is another number
            mode="lines",
            line=line_style(SERIES[rank], DASHES[rank]),
            hovertemplate=f"<b>layer {layer}, head {head}</b><br>position %{{customdata}}"
            "<br>mean score %{y:.3f}<extra></extra>",
        )


def _band(
    x: Float[np.ndarray, " shown"], curves: Float[np.ndarray, "head shown"], name: str
) -> Iterator[go.Scatter]:
    hidden = {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "legendgroup": name}
    yield go.Scatter(x=x, y=curves.min(axis=0), showlegend=False, **hidden)
    yield go.Scatter(x=x, y=curves.max(axis=0), name=name, fill="tonexty", fillcolor=BAND, **hidden)


def shaded(
    x: Float[np.ndarray, " shown"], where: Bool[np.ndarray, " shown"], name: str, top: float
) -> Iterator[go.Scatter]:
    """Shade the stretches of x where something holds, up to ``top``; named in the legend."""
    for index, (first, last) in enumerate(_stretches(where)):
        left, right = float(x[first]) - 0.5, float(x[last]) + 0.5
        yield go.Scatter(
            x=[left, left, right, right],
            y=[0, top, top, 0],
            fill="toself",
            fillcolor=MARKED,
            line_width=0,
            mode="lines",
            hoverinfo="skip",
            name=name,
            legendgroup=name,
            showlegend=index == 0,
        )


def _stretches(where: Bool[np.ndarray, " shown"]) -> list[tuple[int, int]]:
    """First and last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(int)))
    return [(int(start), int(end) - 1) for start, end in edges.reshape(-1, 2)]


def head_points(
    x: Float[np.ndarray, "layer head"],
    y: Float[np.ndarray, "layer head"],
    number: HeadNumbers,
) -> go.Scatter:
    """One marker per head; the hover names it."""
    layer, head = np.indices(x.shape)
    rows = np.stack([layer, head, number.values], axis=-1).reshape(-1, 3)
    return go.Scatter(
        x=x.flatten(),
        y=y.flatten(),
        mode="markers",
        customdata=rows.astype(np.float32),
        hovertemplate="<b>layer %{customdata[0]}, head %{customdata[1]}</b><br>"
        f"%{{xaxis.title.text}}: %{{x:.3g}}<br>%{{yaxis.title.text}}: %{{y:.3f}}<br>"
        f"{number.name}: %{{customdata[2]:{number.format}}}",
    )
