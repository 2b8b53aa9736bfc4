"""The look that all figures share, and what every one of them must state.

Backgrounds are transparent and text is a grey that can be read on white and on near-black, so
that one figure serves a page of either kind. Colours differ in lightness as well as in hue.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

INK = "#787878"
"""Text and axis lines: contrast 4.4 on white and 4.3 on #111."""
FAINT = "rgba(128, 128, 128, 0.25)"
MARKED = "rgba(207, 77, 111, 0.20)"
BAND = "rgba(128, 128, 128, 0.30)"
SEQUENTIAL = "Viridis"
"""For magnitudes: equal steps in lightness, told apart in every kind of colour vision."""
DIVERGING = "PuOr"
"""Only around a zero that means something."""
SERIES = ("#1f77c4", "#d55e00", "#0a9a6c", "#b04aa0", "#a67c00", "#cf4d6f")
"""Lines in one plot: contrast of 3 or more on white and on #111."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

SUBTITLE_CHARACTERS = 100
_LINE_PX = 17
_TITLE_PX = 64
_PLOT_PX = 350
"""A row of panels with the titles of its axes and the legend under it."""
_FRAME_PX = 240
"""What a figure with a row for each of many things needs besides the rows."""
SQUARE, TALL = 560, 640
"""Heights of figures whose axes are of one kind, and of those with two rows of panels."""
BESIDE, BELOW = 0.14, 0.24
"""Room for the axis between panels, as a share of the figure."""
MARK_PX, SMALL_PX = 9, 6
"""Marks, and marks of which there may be hundreds."""
NARROW = 8
"""Numbers on the axis of a panel that stands beside another."""

SHARES = (0.0, 1.02)
"""Range of an axis of shares; a line at 1 is seen whole."""
POINTS = (-0.02, 1.02)
"""The same for marks, which are cut at neither end."""

_AXIS = {
    "gridcolor": FAINT,
    "zeroline": False,
    "linecolor": FAINT,
    "showline": True,
    "ticks": "outside",
    "tickcolor": FAINT,
    "automargin": True,
    "title": {"standoff": 8, "font_size": 13},
}

_COLORBAR = {
    "title": {"side": "right", "font_size": 13},
    "thickness": 14,
    "outlinewidth": 0,
}
PANEL_PX = 14
"""Letters of the heading of a panel; plotly's own are nearly as large as the title's."""

TEMPLATE = go.layout.Template(
    data={
        # A hole is no number.
        "heatmap": [{"colorbar": _COLORBAR, "hoverongaps": False}],
        "scatter": [{"marker": {"colorbar": _COLORBAR}}],
    },
    layout={
        "coloraxis": {"colorbar": _COLORBAR},
        "font": {"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13},
        "font_color": INK,
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "colorway": SERIES,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "title": {
            # Of the whole figure: beside long names of rows the plot itself leaves too little room.
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 14, "l": 14},
            "font_size": 17,
            "subtitle_font_size": 12,
        },
        "legend": {
            # Under the axis title, where it can grow by a line without covering anything.
            "orientation": "h",
            "x": 0,
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "font_size": 12,
            "itemwidth": 44,  # two of the longest dashes
        },
        "margin": {"l": 60, "r": 20, "b": 60},
        "hoverlabel": {"font_size": 13, "align": "left"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": INK, "activecolor": SERIES[0]},
    },
)


def titled(figure: go.Figure, title: str, definition: str, n: str) -> go.Figure:
    """Give a figure the look, its title, and under it the definition and what n is.

    Its height is that of one row of panels where it has none of its own. Marks that say nothing of
    their own on hover name their line and both axes; a map has no grid, which would show in its holes.

    Args:
        figure: It is changed and returned; its axes have their titles already.
        title: What is seen, in a few words.
        definition: What the numbers are, independent of the model.
        n: Over how much they were taken; one line or several.
    """
    lines = [
        line
        for text in (f"{definition};", *n.splitlines())
        for line in textwrap.wrap(text, SUBTITLE_CHARACTERS)
    ]
    top = _TITLE_PX + _LINE_PX * len(lines)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        margin_t=top,
        height=figure.layout.height or top + _PLOT_PX,
    )
    figure.update_annotations({"font_size": PANEL_PX}, selector={"font": {"size": 16}})
    if any(trace.type == "heatmap" for trace in figure.data):
        figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)
    for trace in figure.data:
        if trace.type in ("scatter", "bar") and not (trace.hovertemplate or trace.hoverinfo):
            trace.hovertemplate = _hover(figure, trace)
    return figure


def _hover(figure: go.Figure, trace: go.Scatter | go.Bar) -> str:
    lines = [f"<b>{trace.name}</b>"] if trace.name else []
    for letter, axis in (("x", trace.xaxis or "x"), ("y", trace.yaxis or "y")):
        named = figure.layout[f"{letter}axis{axis[1:]}"].title.text or letter
        is_number = letter == ("x" if getattr(trace, "orientation", "v") == "h" else "y")
        lines.append(f"{named}: %{{{letter}{':.4g' if is_number else ''}}}")
    return "<br>".join(lines) + "<extra></extra>"


def plain(text: str) -> str:
    """Text from elsewhere, so that plotly, which reads markup everywhere, shows it as it is."""
    return html.escape(text, quote=False)


def token_name(labels: Mapping[str, Sequence[str]], row: int, pos: int, n_pos: int) -> str:
    """``': " the"'`` for a hover, from labels of all prompts' tokens; "" where there are none."""
    texts = labels.get("token", ())
    return f": {plain(repr(texts[row * n_pos + pos]))}" if texts else ""


def wrapped(names: Sequence[str]) -> list[str]:
    """Names of categories with a word a line: plotly turns long ones, and cuts them off."""
    return [name.replace(" ", "<br>") for name in names]


def head_name(layer: int, head: int) -> str:
    """The short name of a head, ``L3H7``."""
    return f"L{layer}H{head}"


def rows_height(n_rows: int, row_px: int) -> int:
    """The height of a figure with so many rows of so many pixels."""
    return _FRAME_PX + n_rows * row_px


def tick_step(size: int, at_most: int = 12) -> int:
    """The distance of ticks on an axis of indices: whole, and round where there are many.

    Raises:
        ValueError: The axis is too long for so few ticks.
    """
    for power in range(10):
        for digit in (1, 2, 5):
            if size <= at_most * digit * 10**power:
                return int(digit * 10**power)
    raise ValueError(f"size must be under {at_most}e10; got {size}")


def log_axis(values: Float[np.ndarray, "..."]) -> dict[str, object]:
    """A logarithmic axis with a few plain numbers on it (plotly writes "2" for 20 and for 200)."""
    shown = values[np.isfinite(values) & (values > 0)]
    axis: dict[str, object] = {"type": "log"}
    if not shown.size:
        return axis
    low, high = float(shown.min()) / 1.05, float(shown.max()) * 1.05
    if shown.min() == shown.max():
        # All alike: one number in the middle, instead of plotly's four decades around it.
        low, high = low / 2, high * 2
        axis["range"] = [float(np.log10(low)), float(np.log10(high))]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for digits in _LADDERS:
        ticks = [float(f"{digit}e{power}") for power in decades for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            chosen = inside[:: -(-len(inside) // 7)]
            return axis | {"tickvals": chosen, "ticktext": [f"{tick:g}" for tick in chosen]}
    width = high - low
    step = next(
        digit * 10.0**power
        for power in range(int(np.floor(np.log10(width))), -40, -1)
        for digit in (5, 2, 1)
        if width / digit >= 3 * 10.0**power
    )
    ticks = [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return axis | {"tickvals": ticks, "ticktext": [f"{tick:.6g}" for tick in ticks]}


# From coarse to fine; neighbours are about equally far apart.
_LADDERS: tuple[Sequence[float], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4, 5, 6, 7, 8),
)


def choose_positions(
    n_pos: int, keep: Sequence[int] = (), at_most: int = 192
) -> Int[np.ndarray, " shown"]:
    """Which positions a curve shows: all of them, or the first, the last and some between.

    The values that are shown stay the measured ones; nothing is averaged over neighbours.

    Args:
        n_pos: How many there are.
        keep: Positions that must be shown.
        at_most: About how many are shown; keeps pages of long prompts small.
    """
    if n_pos <= at_most:
        return np.arange(n_pos)
    third = at_most // 3
    between = np.geomspace(third, n_pos - third, num=at_most - 2 * third).astype(int)
    ends = np.concatenate([np.arange(third), np.arange(n_pos - third, n_pos)])
    return np.unique(np.concatenate([ends, between, np.asarray(keep, dtype=int)]))
