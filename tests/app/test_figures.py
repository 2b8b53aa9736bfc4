"""The figures that only the dashboard draws keep the contract of every probe's figures.

Results and tokens are named so that markup in them would show.
"""

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

from app.components import checkpoints
from app.components import compare_figures as compare
from app.components.both_models import sink_mass_figure
from app.components.head_view import pattern_figure
from app.components.intervention_form import _grid
from app.views.playground import keys_figure, moved_figure
from probes.figures.attention_sinks import figures as sink_figures
from probes.figures.theme import DIVERGING, SEQUENTIAL
from tests.probes.figures import checks, looks
from tests.probes.figures.every_figure import EVIL
from tests.probes.figures.planted import planted_result

CONTRACT = (
    checks.a_saved_page_loads_nothing,
    checks.every_axis_has_a_title_with_a_unit,
    checks.every_mark_says_on_hover_what_it_is,
    checks.maps_of_heads_name_layer_and_head,
    checks.texts_from_elsewhere_are_shown_as_they_are,
    looks.colours_can_be_told_apart_by_everyone,
    looks.lines_of_one_panel_differ_in_more_than_colour,
)
TOKENS = [EVIL, "<b>", " the", "\n"]
CURVES = {
    "loss": ([0.0, 1.0, 4.0], [3.0, 2.0, 1.0]),
    "sink_logit_gap": ([0.0, 1.0, 4.0], [0.0, 0.5, 1.0]),
    "backcopy_risk": ([0.0, 1.0, 4.0], [2.0, 1.0, 0.5]),
    EVIL: ([0.0, 1.0], [1.0, 2.0]),
}


def compared():
    """Two results of two names, one of them markup: every figure that can be laid over another."""
    drawn = {
        f"{EVIL} stock": sink_figures(planted_result()),
        "edited": sink_figures(planted_result(position=3)),
    }
    for name in drawn["edited"]:
        figures = {who: found[name] for who, found in drawn.items()}
        kind = compare.kind_of(figures["edited"])
        if kind == "map":
            yield f"{name} side by side", compare.side_by_side(figures)
            yield f"{name} difference", compare.map_differences(figures)[0]
        elif kind == "lines":
            yield f"{name} overlaid", compare.overlaid(figures)[0]
            gap = compare.line_differences(figures)[0]
            if gap is not None:
                yield f"{name} difference", gap


@pytest.fixture(scope="module")
def figures():
    pattern = np.tril(np.full((4, 4), 0.25))
    positions = list(range(4))
    attention = np.full((2, 3, 4), 0.25)
    drawn = dict(compared())
    assert len(drawn) >= 4
    return drawn | {
        "pattern": pattern_figure(pattern, TOKENS, positions, positions, "L0H1"),
        "keys": keys_figure(attention[0, 0], attention[0, 1], TOKENS, "L0H1"),
        "moved": moved_figure([attention, attention[..., ::-1]]),
        "sink mass": sink_mass_figure(np.array([0.5, 0.25]), np.array([0.75, 0.25])),
        "grid": _grid(2, 3, ["L0H1"]),
        "curves": checkpoints.curves_figure(
            CURVES, 4, checkpoints.theory_of("bigram-backcopy", CURVES)
        ),
    }


def test_a_pattern_says_what_it_shows_and_over_how_much(figures):
    assert figures["pattern"].layout.title.text == "L0H1: attention of each query to each key"
    assert "n = 4 queries" in figures["pattern"].layout.title.subtitle.text


def test_a_pattern_has_its_tokens_on_both_axes_and_nothing_ahead_of_a_query(figures):
    drawn = figures["pattern"]
    assert drawn.layout.xaxis.ticktext == drawn.layout.yaxis.ticktext
    assert drawn.layout.xaxis.ticktext[2:] == (" the", "\\n")
    assert np.isnan(drawn.data[0].z[0, 1:]).all()
    assert drawn.data[0].customdata[3][2] == [r"\n", 3, " the", 2]


def test_the_scale_of_a_difference_diverges_around_zero(figures):
    scales = {
        name: figure.layout.coloraxis
        for name, figure in figures.items()
        if figure.layout.coloraxis.cmin is not None
    }
    assert scales
    for name, scale in scales.items():
        wanted = DIVERGING if name.endswith("difference") else SEQUENTIAL
        colours = [colour for _, colour in scale.colorscale]
        assert colours == [c for _, c in compare.go.Heatmap(colorscale=wanted).colorscale]
        assert name.endswith("side by side") or scale.cmin == -scale.cmax < 0


def test_theory_is_drawn_over_the_curves_of_a_run_that_still_trains(figures):
    """1/2 ln t + c through the mean of the last half: at t = 1 and 4 that is 1 - ln 2 and 1."""
    lines = {trace.name: trace for trace in figures["curves"].data}
    grown = lines["sink_logit_gap, theory: 1/2 ln t + c"]
    assert list(grown.x) == [1, 4]  # ln 0 has no place
    np.testing.assert_allclose(grown.y, [1 - np.log(2), 1.0])
    assert list(lines["backcopy_risk, theory: the oracle"].y) == [0, 0, 0]
    assert grown.line.dash == "dash"
    assert grown.yaxis == lines["sink_logit_gap"].yaxis


def test_a_run_that_has_just_begun_has_no_theory_yet():
    begun = {"sink_logit_gap": ([0.0], [0.0])}
    assert checkpoints.theory_of("bigram-backcopy", begun) == {}
    assert checkpoints.theory_of("scan-snap", CURVES) == {}


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("sink_attention", "share"),
        ("loss", "nats"),
        ("resid_peak_ratio", "ratio"),
        ("x", "as logged"),
    ],
)
def test_a_curve_has_a_unit(name, unit):
    assert checkpoints.unit_of(name) == unit


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_what_every_probes_figures_do(check, figures):
    check(figures)
