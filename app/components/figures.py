"""A probe's figures on a page, and the click on a head in a layer x head map."""

import copy
from typing import Any

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from app.components.arrays import array_of

HEAD_AXES = ("head (index)", "layer (index)")
"""The axis titles of ``layer_head_heatmap``."""
ROOM_PX = 32
"""Above a figure without its title: the headings of its panels, and plotly's buttons."""
MOST_TARGETS = 2500
"""Cells that can be clicked; a map of more keeps its hover and is chosen from by name."""


def is_head_map(figure: go.Figure) -> bool:
    """Whether a figure is one map of layers and heads."""
    axes = (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text)
    return axes == HEAD_AXES and any(trace.type == "heatmap" for trace in figure.data)


def show_figure(figure: go.Figure, name: str, scope: str) -> tuple[int, int] | None:
    """Draw a figure; returns the (layer, head) that was clicked in a map of heads."""
    config = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
    key = f"{scope} figure {name}"
    title, caption, drawn = _without_title(figure, name)
    st.markdown(f"**{title}**")
    if caption:
        st.caption(caption)
    alt = f"{name.replace('_', ' ')}: the numbers are in the table below"
    if not is_head_map(drawn) or _n_cells(drawn) > MOST_TARGETS:
        st.plotly_chart(drawn, theme=None, key=key, config=config, alt=alt)
        return None
    add_targets(drawn)
    event: Any = st.plotly_chart(
        drawn,
        theme=None,
        key=key,
        on_select="rerun",
        selection_mode="points",
        config=config,
        alt=alt,
    )
    points = event["selection"]["points"] if event else []
    if not points:
        return None
    return int(points[0]["y"]), int(points[0]["x"])


def _without_title(figure: go.Figure, name: str) -> tuple[str, str, go.Figure]:
    """Title and subtitle as text of the page, which wraps on a phone, and the rest."""
    from app.components.text import plain

    drawn = copy.deepcopy(figure)
    title = drawn.layout.title.text or name.replace("_", " ")
    caption = drawn.layout.title.subtitle.text or ""
    if drawn.layout.title.text:
        top = int(drawn.layout.margin.t or 80)
        drawn.update_layout(title=None, margin_t=ROOM_PX)
        if drawn.layout.height:
            drawn.update_layout(height=int(drawn.layout.height) - top + ROOM_PX)
    return plain(_words(title)), plain(_words(caption)), drawn


def _words(text: str) -> str:
    return text.replace("<br>", " ").replace("<b>", "").replace("</b>", "")


def _n_cells(figure: go.Figure) -> int:
    return max(
        (array_of(trace.z).size for trace in figure.data if trace.type == "heatmap"), default=0
    )


def add_targets(figure: go.Figure) -> None:
    """Lay invisible points over a heat map: heat maps themselves cannot be selected."""
    heatmap = next(trace for trace in figure.data if trace.type == "heatmap")
    n_layers, n_heads = array_of(heatmap.z).shape
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    numbers = None
    if heatmap.customdata is not None:
        numbers = array_of(heatmap.customdata).reshape(n_layers * n_heads, -1)
    figure.add_scatter(
        x=head,
        y=layer,
        mode="markers",
        marker={"symbol": "square", "size": 26, "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        customdata=numbers,
        hovertemplate=heatmap.hovertemplate,
        showlegend=False,
        name="",
    )
    # A chosen head must not fade the marks of the others.
    for trace in figure.data[:-1]:
        if trace.type == "scatter":
            trace.update(selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 1}})
    figure.update_layout(clickmode="event+select", dragmode=False)
