"""Every figure of every probe and toy task, of results that were measured, passes every check."""

import importlib
import inspect
import pkgutil
import re
import sys

import pytest

import probes.figures
from probes.figures.theme import titled
from tests.probes.figures.checks import CHECKS
from tests.probes.figures.every_figure import RESULTS, figures_of, figures_of_several
from workbench.discovery import load_probes, load_toys

SEVERAL = "several results"
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


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_figure_of_a_measured_result(check, figures):
    check(figures)
