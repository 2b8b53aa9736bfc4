"""Figures of activation attacks: what is drawn is what was measured."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.activation_attacks_config import ActivationAttackConfig
from probes.activation_attacks_results import ActivationAttackResult
from probes.figures.activation_attacks import (
    figure_chi,
    figure_dimensions,
    figure_scaling,
    figure_success,
    figures,
    finding,
)

NAN = math.nan


def planted_result():
    """t_max = 4 a exactly, for two seeds alike; one t_max is a lower bound."""
    curve_t = torch.tensor([4, 8, 16, 17])
    success = torch.full((3, 4, 2), NAN)
    success[0, 0], success[0, 1] = 0.5, 0.0
    success[1, 1], success[1, 2] = 0.5, 0.25
    success[2, 2] = 0.5
    flat = torch.where(success.isnan(), success, torch.ones(()))
    return ActivationAttackResult(
        torch.tensor([1, 2, 4]),
        torch.tensor([4.0, 8.0, 16.0]),
        torch.tensor([False, False, True]),
        success,
        success,
        curve_t,
        flat,
        flat,
        flat,
        torch.zeros(3, 5, dtype=torch.long),
        torch.full((3, 4), -1),
        torch.full((3, 1), -1),
        torch.zeros(3, 4, 64),
        torch.tensor(256),
        t_max_tokens=torch.tensor([0.0, 1.0, 2.0]),
        success_tokens=torch.ones(3, 1, 2),
        curve_t_tokens=torch.tensor([1]),
        fraction=torch.tensor([0.25, 0.5]),
        t_max_fraction=torch.tensor([4.0, 8.5]),
        success_fraction=torch.ones(2, 1, 2),
        curve_t_fraction=torch.tensor([4]),
        config=ActivationAttackConfig(n_attacked=(1, 2, 4), fractions=(0.25, 0.5)),
    )


def trace(figure, name):
    return next(each for each in figure.data if (each.name or "").startswith(name))


def test_every_figure_is_there_and_says_n():
    result = planted_result()
    assert set(figures(result)) == {"success", "scaling", "chi", "dimensions"}
    assert set(figures(replace(result, fraction=None))) == {"success", "scaling", "chi"}
    for figure in figures(result).values():
        assert "n = 2 contexts of 64 tokens, 10 attacks" in figure.layout.title.subtitle.text


def test_the_table_has_a_row_for_what_was_tried_with_means_over_the_contexts():
    result = planted_result()
    accuracy = torch.full((3, 4, 2), NAN)
    accuracy[0, 0], accuracy[0, 1] = torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.0])
    accuracy[1, 1], accuracy[1, 2] = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.75])
    accuracy[2, 2] = torch.tensor([0.5, 1.0])
    steps = torch.where(accuracy.isnan(), accuracy, 100 * accuracy)
    table = replace(result, accuracy=accuracy, n_steps=steps, norm_ratio=steps / 50).table()
    assert table == {
        "n_attacked": [1, 1, 2, 2, 4],
        "t": [4, 8, 8, 16, 16],
        "success": [0.5, 0.0, 0.5, 0.25, 0.5],
        "accuracy": [0.75, 0.125, 1.0, 0.625, 0.75],
        "all_correct": [0.5, 0.0, 1.0, 0.0, 0.5],
        "n_steps": [75.0, 12.5, 100.0, 62.5, 75.0],
        "norm_ratio": [1.5, 0.25, 2.0, 1.25, 1.5],
        "t_max": [4.0, 4.0, 8.0, 8.0, 16.0],
    }


def test_squares_are_what_was_tried():
    squares = trace(figure_success(planted_result()), "tried")
    drawn = set(
        zip(squares.x.tolist(), squares.y.tolist(), squares.marker.color.tolist(), strict=True)
    )
    assert drawn == {(1, 4, 0.5), (1, 8, 0.0), (2, 8, 0.5), (2, 16, 0.25), (4, 16, 0.5)}
    assert list(trace(figure_success(planted_result()), "t_max").y) == [4.0, 8.0, 16.0]


def test_the_line_is_kappa_and_lower_bounds_look_different():
    figure = figure_scaling(planted_result())
    line = trace(figure, "t = 4 a")
    assert np.allclose(np.array(line.y) / np.array(line.x), 4.0)
    points = trace(figure, "activations")
    assert list(points.y) == [4.0, 8.0, 16.0]
    assert list(points.marker.symbol) == ["circle", "circle", "triangle-up"]
    assert list(trace(figure, "tokens (0.48 a)").y) == [0.0, 1.0, 2.0]


def test_chi_of_several_models_beside_the_paper():
    result = planted_result()
    softer = replace(result, t_max=2 * result.t_max, t_max_tokens=None)
    figure = figure_chi({"one": result, "two": softer})
    chi = trace(figure, "activations")
    # 64 dimensions of 16 bits, 8 bits a token, kappa 4 and 8.
    assert list(chi.x) == ["one", "two"]
    assert list(chi.y) == pytest.approx([32.0, 16.0])
    assert list(trace(figure, "tokens").x) == ["one"]
    assert list(trace(figure, "tokens").y) == pytest.approx([21 / 10])
    (band,) = figure.layout.shapes
    assert (band.y0, band.y1) == (16.0, 25.0)
    assert figure.layout.yaxis.rangemode == "tozero"
    assert figure.layout.xaxis.type == "category"


def test_the_sweep_is_drawn_against_proportion():
    figure = figure_dimensions(planted_result())
    assert list(trace(figure, "measured").y) == [4.0, 8.5]
    assert list(trace(figure, "in proportion").y) == [0.0, 16.0]
    assert figure.layout.yaxis.rangemode == "tozero"


def test_the_finding_has_the_numbers_and_warns_of_lower_bounds():
    said = finding(planted_result())
    assert "4 tokens are forced per attacked position" in said
    assert "chi = 32" in said
    assert "a^1.00" in said
    assert "1 of 3 t_max are lower bounds" in said
    nothing = replace(planted_result(), t_max=torch.zeros(3), t_max_tokens=None)
    assert "chi" not in finding(nothing)
    assert not [each for each in figure_chi({"one": nothing}).data if each.name == "activations"]
