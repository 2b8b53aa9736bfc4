"""Several results' figures on the same axes, and their difference from the first.

Lines and points are laid over each other: one colour and one dash a result. Maps stand side by
side on one colour scale. Nothing is measured here; only numbers that the figures hold are drawn.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from app.components.arrays import array_of
from app.components.figures import HEAD_AXES
from probes.figures.theme import DASHES, DIVERGING, SEQUENTIAL, SERIES, TEMPLATE, plain

MOST_LINES = 60
"""Lines in one comparison; of figures with more, the first of each are taken and it is said."""
_DRAWN = ("scatter", "scattergl", "bar")
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up")


def kind_of(figure: go.Figure) -> str:
    """``map``, ``lines``, or "" where it cannot be laid over another."""
    kinds = {trace.type for trace in figure.data}
    panels = [name for name in figure.layout if str(name).startswith("xaxis")]
    if kinds and kinds <= {*_DRAWN} and len(panels) <= 1:
        return "lines"
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    if len(maps) == 1 and len(panels) <= 1:
        return "map"
    return ""


def overlaid(figures: Mapping[str, go.Figure]) -> tuple[go.Figure, str]:
    """All results' lines on one pair of axes; the second value says what was left out."""
    first = next(iter(figures.values()))
    each = max(1, MOST_LINES // len(figures))
    merged, left_out = go.Figure(layout=_bare_layout(first)), 0
    for index, (name, figure) in enumerate(figures.items()):
        traces = copy.deepcopy(figure).data
        left_out += max(0, len(traces) - each)
        for number, trace in enumerate(traces[:each]):
            _mark(trace, index)
            trace.legendgroup, trace.showlegend = f"result {index}", number == 0
            trace.name = plain(name)
            merged.add_trace(trace)
    merged.update_layout(showlegend=True)
    note = f"{left_out} lines are not drawn: at most {MOST_LINES} fit here." if left_out else ""
    return merged, note


def _mark(trace: Any, index: int) -> None:
    color, dash = SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]
    if trace.type == "bar":
        trace.marker = {"color": color}
        return
    if trace.mode is None or "lines" in trace.mode:
        trace.line = {"color": color, "dash": dash, "width": 2}
    if trace.fill is not None:
        trace.fillcolor = "rgba(128, 128, 128, 0.08)"
    trace.marker = {"color": color, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 7}


def side_by_side(figures: Mapping[str, go.Figure]) -> go.Figure:
    """All results' maps in a row, on one colour scale."""
    maps = {name: _map_of(figure) for name, figure in figures.items()}
    values = [array_of(heatmap.z).astype(float) for heatmap in maps.values()]
    low, high = _ends(values)
    first = next(iter(figures.values()))
    panels = make_subplots(
        1, len(maps), subplot_titles=[_short(name) for name in maps], shared_yaxes=True,
        horizontal_spacing=0.03,
    )  # fmt: skip
    for column, (heatmap, z) in enumerate(zip(maps.values(), values, strict=True), start=1):
        drawn = go.Heatmap(
            z=z, x=heatmap.x, y=heatmap.y, customdata=array_of(heatmap.customdata)
            if heatmap.customdata is not None else None,
            hovertemplate=heatmap.hovertemplate, hoverongaps=False, coloraxis="coloraxis",
        )  # fmt: skip
        panels.add_trace(drawn, row=1, col=column)
    scale = {"colorscale": SEQUENTIAL, "cmin": low, "cmax": high}
    return _finished(panels, first, scale, _unit(first))


def map_differences(figures: Mapping[str, go.Figure]) -> tuple[go.Figure | None, str]:
    """Every other result's map minus the first one's; None where their sizes differ."""
    maps = {name: array_of(_map_of(figure).z).astype(float) for name, figure in figures.items()}
    base_name, *others = maps
    same = [name for name in others if maps[name].shape == maps[base_name].shape]
    if not same:
        return None, "Their difference is not shown: the maps have different sizes."
    panels = make_subplots(
        1, len(same), subplot_titles=[_short(name) for name in same],
        shared_yaxes=True, horizontal_spacing=0.03,
    )  # fmt: skip
    gaps = [maps[name] - maps[base_name] for name in same]
    reach = max(float(np.nanmax(np.abs(gap), initial=0.0)) for gap in gaps) or 1.0
    first = next(iter(figures.values()))
    place, hover = _map_of(first), f"<b>{_cell_text(first)}</b><br>difference: %{{z:+.4g}}"
    for column, gap in enumerate(gaps, start=1):
        drawn = go.Heatmap(
            z=gap, x=place.x, y=place.y, hovertemplate=f"{hover}<extra></extra>",
            hoverongaps=False, coloraxis="coloraxis",
        )  # fmt: skip
        panels.add_trace(drawn, row=1, col=column)
    scale = {"colorscale": DIVERGING, "cmin": -reach, "cmax": reach}
    missing = [name for name in others if name not in same]
    notes = [f"Each minus {base_name}."]
    notes += ["The maps are equal."] if all(np.all(gap == 0) for gap in gaps) else []
    notes += [f"Of another size, so without a difference: {', '.join(missing)}."] if missing else []
    return _finished(panels, first, scale, f"difference: {_unit(first)}"), " ".join(notes)


def line_differences(figures: Mapping[str, go.Figure]) -> tuple[go.Figure | None, str]:
    """Lines of the same name and the same x, minus the first result's."""
    base_name, *others = figures
    base = {str(trace.name): trace for trace in figures[base_name].data if trace.type in _DRAWN}
    drawn = go.Figure(layout=_bare_layout(figures[base_name]))
    for index, name in enumerate(others, start=1):
        matched = 0
        for trace in figures[name].data:
            twin = base.get(str(trace.name))
            if twin is None or matched >= MOST_LINES // len(figures) or not _same_x(trace, twin):
                continue
            gap = array_of(trace.y).astype(float) - array_of(twin.y).astype(float)
            line = go.Scatter(x=array_of(trace.x), y=gap, mode="lines", name=plain(name))
            _mark(line, index)
            line.update(legendgroup=f"result {index}", showlegend=matched == 0)
            line.hovertemplate = f"{trace.name or ''}<br>%{{x}}: %{{y:+.4g}}"
            drawn.add_trace(line)
            matched += 1
    if not drawn.data:
        return None, "Their difference is not shown: no two lines have the same name and x."
    title = drawn.layout.yaxis.title.text
    drawn.update_yaxes(type="linear", zeroline=True, zerolinecolor="#787878", autorange=True)
    drawn.update_yaxes(title_text=f"difference: {title}" if title else "difference")
    drawn.update_layout(showlegend=True, shapes=[], annotations=[])
    return drawn, f"Lines of the same name, minus those of {base_name}."


def _same_x(trace: Any, twin: Any) -> bool:
    if trace.x is None or twin.x is None or trace.y is None or twin.y is None:
        return False
    ours, theirs = array_of(trace.x), array_of(twin.x)
    numeric = array_of(trace.y).dtype.kind in "fiu" and array_of(twin.y).dtype.kind in "fiu"
    return numeric and ours.shape == theirs.shape and bool(np.all(ours == theirs))


def _cell_text(figure: go.Figure) -> str:
    """What a cell is called on hover."""
    across, down = (axis.title.text for axis in (figure.layout.xaxis, figure.layout.yaxis))
    if (across, down) == HEAD_AXES:
        return "layer %{y}, head %{x}"
    return f"{down}: %{{y}}, {across}: %{{x}}"


def _map_of(figure: go.Figure) -> Any:
    return next(trace for trace in figure.data if trace.type == "heatmap")


def _ends(values: list[np.ndarray]) -> tuple[float, float]:
    finite = np.concatenate([value[np.isfinite(value)].ravel() for value in values])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _unit(figure: go.Figure) -> str:
    bar = _map_of(figure).colorbar
    return (bar.title.text if bar and bar.title else None) or "value"


def _short(name: str) -> str:
    return plain(name if len(name) <= 44 else f"{name[:43]}…")


def _bare_layout(figure: go.Figure) -> dict[str, Any]:
    layout = copy.deepcopy(figure.layout)
    layout.title, layout.margin.t, layout.height = None, 30, 460
    return dict(layout.to_plotly_json())


def _finished(panels: go.Figure, first: go.Figure, scale: dict[str, Any], unit: str) -> go.Figure:
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 14}
    panels.update_layout(template=TEMPLATE, coloraxis=scale | {"colorbar": bar})
    panels.update_layout(height=max(320, int(first.layout.height or 380) - 60), margin_t=50)
    n_rows, n_columns = array_of(panels.data[0].z).shape
    every = [max(1, number // 12) for number in (n_columns, n_rows)]  # never half a head
    panels.update_xaxes(title=first.layout.xaxis.title.text, showgrid=False, dtick=every[0])
    panels.update_yaxes(showgrid=False, dtick=every[1])
    if first.layout.yaxis.autorange == "reversed":
        panels.update_yaxes(autorange="reversed")
    panels.update_yaxes(title=first.layout.yaxis.title.text, row=1, col=1)
    panels.update_annotations(font_size=12)
    return panels
