"""What every figure of every probe and toy task must do, whoever looks at it and where."""

import importlib
import inspect
import math
import pkgutil
import re
import sys
from numbers import Real

import plotly.graph_objects as go
import pytest

import probes.figures
from probes.figures.theme import DASHES, DIVERGING, INK, SEQUENTIAL, titled
from tests.probes.figures.every_figure import RESULTS, figures_of, figures_of_several
from workbench.discovery import load_probes, load_toys

SEVERAL = "several results"
ALLOWED_TAGS = "br|b|i|extra"
"""Ours; plotly reads them in every text, and links and images too."""


MODULES = [
    importlib.import_module(f"probes.figures.{info.name}")
    for info in pkgutil.iter_modules(probes.figures.__path__)
]


@pytest.fixture(scope="module")
def called():
    """The functions of probes.figures that have drawn something, as module.function."""
    return set()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, called):
    """All figures by case, drawn once."""

    def watched(*given):
        frame = sys._getframe(1)
        while not frame.f_code.co_name.startswith("figure"):
            frame = frame.f_back
        called.add((frame.f_code.co_filename, frame.f_code.co_name))
        return titled(*given)

    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            if hasattr(module, "titled"):
                patch.setattr(module, "titled", watched)
        found = {case: figures_of(case, folder) for case in RESULTS}
        return found | {SEVERAL: figures_of_several(folder)}


@pytest.fixture(params=[*RESULTS, SEVERAL])
def figures(request, drawn):
    assert drawn[request.param]
    return drawn[request.param]


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


def test_no_probe_and_no_toy_is_forgotten():
    known = {probe.name for probe in [*load_probes(), *load_toys()]}
    assert known == {case.split()[0] for case in RESULTS}


def test_no_function_that_draws_is_forgotten(drawn, called):
    written = {
        (module.__file__, name)
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("figure_") and function.__module__ == module.__name__
    }
    assert written <= called, written - called


def test_every_axis_has_a_title_with_a_unit(figures):
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


def test_every_figure_says_what_it_shows_and_over_how_much(figures):
    for name, figure in figures.items():
        assert figure.layout.title.text, name
        lines = figure.layout.title.subtitle.text.split("<br>")
        assert re.search(r"\bn = \d", " ".join(lines)), f"{name}: {lines}"
        # 700 pixels, the width of a picture, hold about 105 letters of this size.
        assert max(map(len, lines)) <= 105, f"{name}: {lines}"


def test_every_mark_says_on_hover_what_it_is(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.type == "table" or trace.hoverinfo == "skip":
                continue
            assert trace.hovertemplate, f"{name}: {trace.type} {trace.name}"
            assert re.search(r"%{(x|y|z|customdata)", trace.hovertemplate), f"{name}: {trace.name}"


def test_maps_of_heads_name_layer_and_head(figures):
    for name, figure in figures.items():
        titles = [axis.title.text for axis in axes_of(figure)[:2]]
        if titles == ["head (index)", "layer (index)"]:
            assert "layer %{y}, head %{x}" in figure.data[0].hovertemplate, name


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


def test_layers_and_heads_stand_at_whole_numbers(figures):
    for name, figure in figures.items():
        for axis in axes_of(figure):
            if axis.title.text in ("layer (index)", "head (index)"):
                found = set(along(figure, axis))
                assert found <= set(range(100)), f"{name}: {axis.plotly_name} {found}"


def test_positions_name_their_token_where_the_result_knows_it(drawn):
    walk, flow = drawn["token-dynamics"], drawn["information-flow"]
    sources = [name for _, name in walk["sources"].data[0].customdata[0]]
    assert ": ' one'" in sources
    marks = [row[-1] for trace in flow["token_scores"].data for row in trace.customdata]
    assert all(re.match(r": '.+'$", name) for name in marks), marks
    edges = [
        row[2] for trace in flow["routes"].data if trace.customdata for row in trace.customdata
    ]
    assert all(re.match(r"\d+: '.*'$", start) for start in edges), edges


def test_colours_can_be_told_apart_by_everyone(figures):
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


def test_lines_of_one_panel_differ_in_more_than_colour(figures):
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


def test_texts_from_elsewhere_are_shown_as_they_are(figures):
    for name, figure in figures.items():
        for text in strings(figure.to_plotly_json()):
            tag = re.search(rf"<(?=[a-zA-Z/!])(?!/?({ALLOWED_TAGS})\b)", text)
            assert not tag, f"{name}: {text[:200]}"


def test_a_saved_page_loads_nothing(figures):
    for name, figure in figures.items():
        page = figure.to_html(include_plotlyjs=False)
        found = re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", page)
        assert not found, f"{name}: {found}"
