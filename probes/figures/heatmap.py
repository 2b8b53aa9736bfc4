"""A layer x head heat map whose hover names the head and gives every number."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from probes.figures.theme import DIVERGING, SEQUENTIAL, rows_height, tick_step

MANY = 400
"""Between more cells than these the gaps would be most of what is seen."""
ROW_PX = 26
HEIGHTS = (370, 760)
"""The least and the most."""


class HeadNumbers(NamedTuple):
    """One number per head, with what to call it and how to write it."""

    name: str
    """With its unit, if it has one."""
    values: Float[np.ndarray, "layer head"]
    format: str = ".3f"
    """As d3 writes numbers: ``.3f``, ``.1%``, ``.3g``."""


def layer_head_heatmap(
    shown: HeadNumbers,
    others: Sequence[HeadNumbers] = (),
    *,
    scale: tuple[float, float] | None = None,
    zero: float | None = None,
) -> go.Figure:
    """Draw one number per head as colour; layer 0 is at the top.

    Args:
        shown: What the colour says. NaN leaves a hole.
        others: More numbers for the hover.
        scale: The ends of the colour scale; by default those of the numbers.
        zero: A value around which the scale diverges; only where it means "no effect".
    """
    n_layers, n_heads = shown.values.shape
    low, high = _ends(shown.values, zero) if scale is None else scale
    numbers = np.stack([number.values for number in (shown, *others)], axis=-1)
    gap = int(shown.values.size <= MANY)
    heatmap = go.Heatmap(
        z=shown.values.astype(np.float32),
        # float32: half the size on a page, and more digits than the hover shows.
        customdata=numbers.astype(np.float32),
        zmin=low,
        zmax=high,
        colorscale=SEQUENTIAL if zero is None else DIVERGING,
        colorbar={"title": {"text": shown.name}},
        hovertemplate=_hover((shown, *others)),
        xgap=gap,
        ygap=gap,
    )
    figure = go.Figure(heatmap)
    figure.update_xaxes(title="head (index)", dtick=tick_step(n_heads))
    figure.update_yaxes(title="layer (index)", dtick=tick_step(n_layers), autorange="reversed")
    return figure.update_layout(height=int(np.clip(rows_height(n_layers, ROW_PX), *HEIGHTS)))


def _hover(numbers: Sequence[HeadNumbers]) -> str:
    lines = ["<b>layer %{y}, head %{x}</b>"]
    lines += [
        f"{number.name}: %{{customdata[{index}]:{number.format}}}"
        for index, number in enumerate(numbers)
    ]
    return "<br>".join(lines) + "<extra></extra>"


def _ends(values: Float[np.ndarray, "layer head"], zero: float | None) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    if zero is None:
        return float(finite.min()), float(finite.max())
    reach = float(np.abs(finite - zero).max()) or 1.0
    return zero - reach, zero + reach
