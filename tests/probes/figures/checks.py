"""What every figure must do, whoever looks at it and where; each check takes figures by name."""

import math
import re
from numbers import Real

import numpy as np

from tests.probes.figures.looks import (
    colours_are_taken_in_their_order,
    colours_can_be_told_apart_by_everyone,
    lines_of_one_panel_differ_in_more_than_colour,
    series_look_different_from_each_other_and_alike_in_every_panel,
)

ALLOWED_TAGS = "br|b|i|extra"
"""Ours; plotly reads them in every text, and links and images too."""


def axes_of(figure):
    return [*figure.select_xaxes(), *figure.select_yaxes()]


def strings(value):
    """Every text in a figure, but for the names of its parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from () if name == "template" else strings(inner)
    elif not isinstance(value, bytes) and hasattr(value, "__iter__"):
        for inner in value:
            yield from strings(inner)


def along(figure, axis):
    """The values that are drawn along an axis, all that are numbers."""
    letter, name = axis.plotly_name[0], axis.plotly_name.replace("axis", "")
    for trace in figure.data:
        if (getattr(trace, f"{letter}axis", None) or letter) != name:
            continue
        values = getattr(trace, letter, None)
        for value in () if values is None else values:
            if isinstance(value, Real) and math.isfinite(value):
                yield float(value)


# What is written


def every_axis_has_a_title_with_a_unit(figures):
    for name, figure in figures.items():
        if figure.data[0].type == "table":
            continue
        axes = axes_of(figure)
        assert len(axes) >= 2
        for axis in axes:
            # An axis that follows another one's range is labelled there.
            title = axis.title.text or ("(as there)" if axis.matches else "")
            assert re.search(r"\w.* \(.+\)", title) or title == "(as there)", (
                f"{name}: {axis.plotly_name} is called {title!r}"
            )


def every_figure_says_what_it_shows_and_over_how_much(figures):
    for name, figure in figures.items():
        assert figure.layout.title.text, name
        lines = figure.layout.title.subtitle.text.split("<br>")
        assert re.search(r"\bn = \d", " ".join(lines)), f"{name}: {lines}"
        # 700 pixels, the width of a picture, hold about 105 letters of this size.
        assert max(map(len, lines)) <= 105, f"{name}: {lines}"


def every_mark_says_on_hover_what_it_is(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.type == "table" or trace.hoverinfo == "skip":
                continue
            assert trace.hovertemplate, f"{name}: {trace.type} {trace.name}"
            assert re.search(r"%{(x|y|z|customdata)", trace.hovertemplate), f"{name}: {trace.name}"


def what_a_hover_reads_is_there(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            template = getattr(trace, "hovertemplate", None) or ""
            for column in re.findall(r"%{customdata(?:\[(\d+)\])?", template):
                assert trace.customdata is not None, f"{name}: {trace.name}"
                depth = 2 if trace.type == "heatmap" else 1
                shape = np.asarray(trace.customdata).shape
                assert len(shape) == depth + bool(column), f"{name}: {trace.name} {shape}"
                assert not column or int(column) < shape[-1], f"{name}: {trace.name} {template}"


def maps_of_heads_name_layer_and_head(figures):
    for name, figure in figures.items():
        titles = [axis.title.text for axis in axes_of(figure)[:2]]
        if titles == ["head (index)", "layer (index)"]:
            assert "layer %{y}, head %{x}" in figure.data[0].hovertemplate, name


def texts_from_elsewhere_are_shown_as_they_are(figures):
    for name, figure in figures.items():
        for text in strings(figure.to_plotly_json()):
            tag = re.search(rf"<(?=[a-zA-Z/!])(?!/?({ALLOWED_TAGS})\b)", text)
            assert not tag, f"{name}: {text[:200]}"


def a_saved_page_loads_nothing(figures):
    for name, figure in figures.items():
        page = figure.to_html(include_plotlyjs=False)
        found = re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", page)
        assert not found, f"{name}: {found}"


def the_legend_names_each_series_once(figures):
    for name, figure in figures.items():
        groups, shown = set(), []
        for part in (*figure.data, *figure.layout.shapes):
            if part.type in ("heatmap", "table") or not part.name:
                continue
            groups.add(part.legendgroup or part.name)
            listed = (
                part.showlegend if part in figure.layout.shapes else part.showlegend is not False
            )
            shown += [part.name] if listed else []
        # Panels of one line each have their headings instead.
        assert sorted(shown) == sorted(set(shown)), f"{name}: {shown}"
        if shown:
            assert set(shown) >= groups, f"{name}: {groups - set(shown)} are not in the legend"


# Where it stands


def layers_and_heads_stand_at_whole_numbers(figures):
    for name, figure in figures.items():
        for axis in axes_of(figure):
            if axis.title.text in ("layer (index)", "head (index)"):
                found = set(along(figure, axis))
                assert found <= set(range(100)), f"{name}: {axis.plotly_name} {found}"


def _lengths(trace):
    """How many marks each part of a trace speaks of; a text for all of them speaks of none."""
    parts = [trace.x, trace.y, trace.customdata, trace.text, trace.error_y.array]
    parts += [trace.error_y.arrayminus, trace.marker.color]
    parts += [trace.marker.size, trace.marker.symbol] if trace.type == "scatter" else []
    return {len(part) for part in parts if part is not None and not isinstance(part, str | Real)}


def every_part_of_a_trace_has_as_many_entries(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.type in ("scatter", "bar"):
                assert len(_lengths(trace)) == 1, f"{name}: {trace.name} {_lengths(trace)}"
            elif trace.type == "heatmap":
                n_rows, n_columns = np.shape(trace.z)
                assert trace.x is None or len(trace.x) == n_columns, name
                assert trace.y is None or len(trace.y) == n_rows, name
                if trace.customdata is not None:
                    assert np.shape(trace.customdata)[:2] == (n_rows, n_columns), name
            else:
                assert len({len(column) for column in trace.cells.values}) == 1, name


def every_panel_holds_something_and_has_its_heading(figures):
    for name, figure in figures.items():
        letters = {(axis.plotly_name[0], axis.plotly_name[5:]) for axis in axes_of(figure)}
        held = {
            (letter, (getattr(trace, f"{letter}axis", None) or letter)[1:])
            for trace in figure.data
            for letter in "xy"
        }
        assert figure.data[0].type == "table" or letters == held, f"{name}: {letters ^ held}"
        columns = [axis.domain for axis in figure.select_xaxes() if axis.domain]
        rows = {axis.domain for axis in figure.select_yaxes() if axis.domain}
        width = sum(right - left for left, right in {*columns})
        assert not rows or width > 0.6, f"{name}: panels are {width:.0%} of the figure wide"
        headings = [note for note in figure.layout.annotations if note.yref == "paper"]
        for note in headings:
            middles = [sum(domain) / 2 for domain in columns]
            assert min(abs(note.x - middle) for middle in middles) < 1e-6, f"{name}: {note.text}"
        assert len(headings) in (0, len(columns)), f"{name}: {[note.text for note in headings]}"


def an_axis_shows_all_that_is_on_it(figures):
    for name, figure in figures.items():
        for axis in axes_of(figure):
            values = [*along(figure, axis)]
            if axis.range and values and axis.type != "log":
                low, high = sorted(axis.range)
                assert low <= min(values), f"{name}: {axis.title.text}"
                assert max(values) <= high + 1e-9, f"{name}: {axis.title.text}"
                if "share" in (axis.title.text or "") and "patterns" not in name:
                    assert -0.05 <= low <= 0 < 1 < high <= 1.05, f"{name}: {axis.range}"
            if axis.type == "log":
                assert not axis.range or axis.range[0] < axis.range[1], name


def numbers_on_an_axis_are_whole_and_neither_many_nor_few(figures):
    for name, figure in figures.items():
        for axis in axes_of(figure):
            if axis.dtick is None or axis.type in ("log", "category"):
                continue
            values = [*along(figure, axis)]
            if not values:
                continue
            count = (max(values) - min(values)) / axis.dtick + 1
            assert axis.dtick == int(axis.dtick) >= 1, f"{name}: {axis.title.text} {axis.dtick}"
            assert count <= 13, f"{name}: {axis.title.text} has {count} numbers"
            assert axis.dtick == 1 or count >= 2, f"{name}: {axis.title.text} has {count} numbers"


def maps_have_no_grid_and_their_holes_no_hover(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.type == "heatmap":
                assert trace.hoverongaps is None, name
                assert figure.layout.template.data.heatmap[0].hoverongaps is False
                for axis in axes_of(figure):
                    assert axis.showgrid is False, f"{name}: {axis.plotly_name}"


CHECKS = (
    every_axis_has_a_title_with_a_unit,
    every_figure_says_what_it_shows_and_over_how_much,
    every_mark_says_on_hover_what_it_is,
    what_a_hover_reads_is_there,
    maps_of_heads_name_layer_and_head,
    texts_from_elsewhere_are_shown_as_they_are,
    a_saved_page_loads_nothing,
    the_legend_names_each_series_once,
    layers_and_heads_stand_at_whole_numbers,
    every_part_of_a_trace_has_as_many_entries,
    every_panel_holds_something_and_has_its_heading,
    an_axis_shows_all_that_is_on_it,
    numbers_on_an_axis_are_whole_and_neither_many_nor_few,
    maps_have_no_grid_and_their_holes_no_hover,
    colours_can_be_told_apart_by_everyone,
    lines_of_one_panel_differ_in_more_than_colour,
    series_look_different_from_each_other_and_alike_in_every_panel,
    colours_are_taken_in_their_order,
)
