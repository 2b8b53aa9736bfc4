"""The route graph of one prompt: positions across, depth upwards, an edge a line."""

import itertools
from collections.abc import Iterator

import plotly.graph_objects as go
from torch import Tensor

from probes.figures.theme import DASHES, INK, MARK_PX, SERIES, SQUARE, tick_step, titled, token_name
from probes.information_flow import InformationFlowResult
from probes.information_flow_routes import MLP, RESIDUAL

WIDTHS = (0.0, 0.1, 0.3, 1.01)
"""Bounds of the importance classes; a class is a width."""
KINDS = ("attention", "residual stream", "MLP")


def figure_routes(result: InformationFlowResult, prompt: int = 0) -> go.Figure:
    """Draw the pruned graph of one prompt.

    Args:
        result: What the probe found, with ``routes``.
        prompt: Which one.
    """
    assert result.route_edges is not None
    assert result.route_importance is not None
    mine = result.route_edges[:, 0] == prompt
    edges, share = result.route_edges[mine, 1:], result.route_importance[mine]
    n_pos = result.item_of_pos.shape[1]
    names = [token_name(result.labels, prompt, pos, n_pos) for pos in range(n_pos)]
    figure = go.Figure([*_lines(edges, share), _heads(edges, share, names)])
    items = (result.item_of_pos[prompt] >= 0).nonzero()[:, 0].tolist()
    top = int(edges[:, 0].max()) + 1 if len(edges) else 1
    figure.add_scatter(
        x=items,
        y=[top] * len(items),
        mode="markers",
        name="item token, where the graph starts",
        marker={"symbol": "diamond", "size": MARK_PX, "color": SERIES[2]},
        hovertemplate="position %{x}<extra>item</extra>",
    )
    figure.update_xaxes(
        title="position (tokens)", dtick=tick_step(n_pos), range=[-0.5, n_pos - 0.5]
    )
    figure.update_yaxes(title="depth (blocks)", dtick=tick_step(top + 1))
    return titled(
        figure.update_layout(height=SQUARE),
        f"Routes into the items of prompt {prompt}",
        "an edge's importance is the share of its node that it is near to in the L1 norm; drawn from "
        f"{result.config.route_threshold:g} on, followed downwards from the items' last states",
        f"n = {len(edges)} edges of 1 prompt",
    )


def _kind(head: int) -> int:
    return 1 if head == RESIDUAL else 2 if head == MLP else 0


def _lines(edges: Tensor, share: Tensor) -> Iterator[go.Scatter]:
    """One trace a kind and width: a thousand edges stay a dozen traces."""
    for kind, name in enumerate(KINDS):
        shown = False
        for width, (low, high) in enumerate(itertools.pairwise(WIDTHS)):
            x: list[float | None] = []
            y: list[float | None] = []
            for (layer, head, start, end), weight in zip(
                edges.tolist(), share.tolist(), strict=True
            ):
                if _kind(head) != kind or not low <= weight < high:
                    continue
                # Beside the stream, so that both can be seen.
                shift = 0.18 if kind == 2 else 0.0
                bottom = layer + 0.5 if kind == 2 else layer
                x += [start + shift, end + shift, None]
                y += [bottom, layer + 1 if kind else layer + 0.5, None]
            if not x:
                continue
            yield go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=not shown,
                hoverinfo="skip",
                line={
                    "color": (SERIES[0], INK, SERIES[1])[kind],
                    "width": 1 + 1.5 * width,
                    "dash": DASHES[kind],
                },
            )
            shown = True


def _heads(edges: Tensor, share: Tensor, names: list[str]) -> go.Scatter:
    """Invisible points in the middle of edges that say which they are."""
    rows = [
        (
            (start + end) / 2,
            layer + 0.25,
            layer,
            _name(head),
            f"{start}{names[start]}",
            f"{end}{names[end]}",
            weight,
        )
        for (layer, head, start, end), weight in zip(edges.tolist(), share.tolist(), strict=True)
    ]
    return go.Scatter(
        x=[row[0] for row in rows],
        y=[row[1] for row in rows],
        customdata=[row[2:] for row in rows],
        mode="markers",
        marker_color="rgba(0, 0, 0, 0)",
        showlegend=False,
        hovertemplate="layer %{customdata[0]}, %{customdata[1]}<br>position %{customdata[2]} to "
        "%{customdata[3]}<br>importance %{customdata[4]:.3f}<extra></extra>",
    )


def _name(head: int) -> str:
    return f"head {head}" if head >= 0 else KINDS[_kind(head)]
