"""Figures of planted results, which are drawn anew by every test, pass every check."""

import pytest

from tests.probes.figures.checks import CHECKS
from tests.probes.figures.planted_cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_every_figure_of_a_planted_result(case):
    figures = CASES[case]()
    assert figures
    for check in CHECKS:
        check(figures)
