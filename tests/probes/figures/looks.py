"""How every figure must look: colours and dashes that tell its series apart."""

import math

import plotly.graph_objects as go

from probes.figures.theme import DASHES, DIVERGING, INK, SEQUENTIAL, SERIES


def colours_can_be_told_apart_by_everyone(figures):
    """Scales are Viridis, or PuOr around a zero that means something; categories have two looks."""
    scales = {go.Heatmap(colorscale=name).colorscale for name in (SEQUENTIAL, DIVERGING)}
    for name, figure in figures.items():
        diverging = go.Heatmap(colorscale=DIVERGING).colorscale
        for trace in figure.data:
            holder = trace.marker if trace.type == "scatter" else trace
            if trace.type not in ("heatmap", "scatter") or holder.colorscale is None:
                continue
            steps = {color for _, color in holder.colorscale}
            assert holder.colorscale in scales or len(steps) == 2, f"{name}: {holder.colorscale}"
            if holder.colorscale == diverging:
                assert trace.zmin == -trace.zmax, f"{name}: {trace.zmin} to {trace.zmax}"


def lines_of_one_panel_differ_in_more_than_colour(figures):
    for name, figure in figures.items():
        looks = {}
        for trace in figure.data:
            if trace.type != "scatter" or "lines" not in (trace.mode or "lines"):
                continue
            if trace.showlegend is False or not trace.line.width or trace.line.color == INK:
                continue  # grey is told apart by not being a colour
            look = (trace.line.dash, trace.line.width, trace.marker.symbol)
            panel = looks.setdefault(trace.xaxis, {})
            panel.setdefault(look, set()).add(trace.legendgroup or trace.name)
        for panel in looks.values():
            n_lines = sum(map(len, panel.values()))
            # In the residual peak the dash is the position, the colour the domain.
            most = 9 if name == "residual_peak" else math.ceil(n_lines / len(DASHES))
            assert max(map(len, panel.values())) <= most, f"{name}: {panel}"


def _looks(figure):
    """Panel, name and look of each trace that can be seen; plotly gives colours by the place."""
    for index, trace in enumerate(figure.data):
        if trace.type not in ("scatter", "bar"):
            continue
        line = trace.line if trace.type == "scatter" else None
        if line is not None and line.width == 0:
            continue
        color = (line.color if line is not None else None) or trace.marker.color
        color = SERIES[index % len(SERIES)] if color is None else color
        shape = (line.dash, trace.mode) if line is not None else trace.marker.pattern.shape
        symbol = trace.marker.symbol if trace.type == "scatter" else None
        name = trace.legendgroup or trace.name
        yield (trace.xaxis, trace.yaxis), name, (color, shape, symbol)


def series_look_different_from_each_other_and_alike_in_every_panel(figures):
    for name, figure in figures.items():
        named, panels = {}, {}
        for panel, series, look in _looks(figure):
            if series and isinstance(look[0], str) and isinstance(look[2], str | int | None):
                named.setdefault(series, set()).add(look)
                panels.setdefault((panel, look), set()).add(series)
        for (panel, look), series in panels.items():
            assert len(series) == 1, f"{name}: {panel} {look} {series}"
        for series, looks in named.items():
            # The routes' widths are classes of importance; here only colour and dash count.
            assert len(looks) == 1, f"{name}: {series} {looks}"


def colours_are_taken_in_their_order(figures):
    """So that the first and the second series look alike from figure to figure."""
    for name, figure in figures.items():
        taken = {look[0] for _, _, look in _looks(figure) if isinstance(look[0], str)}
        taken &= {*SERIES}
        if any(trace.type == "scatter" and trace.marker.colorscale for trace in figure.data):
            continue  # A line must be seen on the scale.
        assert taken == {*SERIES[: len(taken)]}, f"{name}: {taken}"
