"""A result in a notebook: a short card, and under it the main figure."""

import sys
from types import SimpleNamespace

import pytest

from tests.probes.figures.planted import planted_result
from workbench.discovery import find_probe
from workbench.result import Result

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def result():
    provenance = {"model": EVIL}
    probe = find_probe("attention-sinks")
    return Result.from_measurement(probe, planted_result(), key="a" * 64, provenance=provenance)


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is given to display, in order."""
    given = []
    kernel = SimpleNamespace(kernel=object())
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: kernel)
    monkeypatch.setattr("IPython.display.display", lambda what, **_: given.append(what))
    return given


def test_a_notebook_shows_the_card_and_then_the_main_figure(result, shown):
    result._ipython_display_()
    card, figure = shown
    assert card["text/html"] == result._repr_html_()
    assert "sink_rate" in card["text/html"]
    assert card["text/plain"] == repr(result)
    assert figure.to_json() == result.figures()["sink_heads"].to_json()


def test_texts_of_others_stay_text(result, shown):
    result._ipython_display_()
    assert "&lt;img src=x" in shown[0]["text/html"]
    assert EVIL not in shown[0]["text/html"]


def test_without_plotly_the_card_says_what_to_install(result, shown, monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == "plotly" or name.startswith("probes.figures"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    result._ipython_display_()
    (card,) = shown
    assert "sink_rate" in card["text/html"]
    assert "a figure needs plotly; install it: pip install" in card["text/html"]


def test_a_terminal_prints_the_text_and_opens_nothing(result, shown, monkeypatch, capsys):
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: SimpleNamespace())
    result._ipython_display_()
    assert capsys.readouterr().out == f"{result!r}\n"
    assert shown == []


def test_a_probe_without_figures_shows_its_card(result, shown, monkeypatch):
    monkeypatch.setattr("workbench.discovery.find_figures", lambda probe: None)
    result._ipython_display_()
    assert len(shown) == 1
    assert result.figures() == {}
    assert result.finding().startswith("sink_rate 0.16")


def test_the_finding_is_the_probes_own_sentence(result):
    assert "16.7% of (prompt, layer, head) triples sink at position 0" in result.finding()
