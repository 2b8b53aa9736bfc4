"""Numbers of an evaluation, worked by hand."""

import math

import numpy as np
import pytest

from workbench.evaluation.measures import Scored, calibration_error, difference, mcnemar


def scored(scores, answers, parsed):
    return Scored(tuple(scores), tuple(answers), tuple(parsed), (1.0,) * len(answers))


def test_accuracy_counts_what_cannot_be_read_as_wrong_and_says_so():
    result = scored([(-1.0, -2.0)] * 4, [0, 0, 1, 1], [0, -1, -1, 0])
    metrics = result.metrics()
    assert metrics["accuracy"] == 0.25
    assert metrics["invalid_rate"] == 0.5
    assert metrics["label_accuracy"] == 0.5
    assert metrics["n"] == 4


def test_margin_is_that_of_the_right_label_and_a_tie_is_wrong():
    result = scored([(-1.0, -3.0, -2.0), (-1.0, -1.0, -5.0)], [0, 1], [0, 1])
    np.testing.assert_allclose(result.margins, [1.0, 0.0])
    assert result.metrics()["label_accuracy"] == 0.5


def test_calibration_error_of_two_bins():
    sure, unsure = (math.log(0.95), math.log(0.05)), (math.log(0.55), math.log(0.45))
    result = scored([sure, sure, unsure, unsure], [0, 1, 0, 0], [0, 0, 0, 0])
    # Half the questions at .95 and right half the time, half at .55 and always right.
    assert calibration_error(result) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)


def test_a_perfectly_calibrated_model_has_none():
    certain = (0.0, -1000.0)
    assert calibration_error(scored([certain] * 3, [0] * 3, [0] * 3)) == pytest.approx(0.0)


def test_mcnemar_counts_only_what_changed():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 * 0.5**5)
    assert mcnemar(1, 1) == 1.0


def test_the_interval_of_a_difference_holds_it_and_shrinks_to_nothing_without_change():
    before, after = np.array([0.0, 0, 1, 1] * 25), np.array([1.0, 0, 1, 1] * 25)
    change = difference(before, after)
    assert change.value == 0.25
    assert change.low < 0.25 < change.high
    # A quarter of a hundred coins: standard error sqrt(.25 * .75 / 100) = .0433.
    assert change.high - change.low == pytest.approx(2 * 1.96 * 0.0433, rel=0.15)
    assert (change.gained, change.lost) == (25, 0)
    same = difference(before, before)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
