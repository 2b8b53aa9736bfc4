"""Figures of reachability show the numbers that were given, and say what n is."""

import numpy as np
import pytest
import torch

from probes.figures.reachability import figures, finding
from probes.reachability_epsilon import epsilon_curve
from probes.reachability_results import ReachabilityConfig, ReachabilityResult


def result_of(k, **changes):
    k = torch.tensor(k)
    n = len(k)
    epsilon = epsilon_curve(k, 4)
    prompts = torch.where(torch.arange(4) < k[:, None], torch.arange(4), -1)
    ranks = torch.arange(n) * 10
    fields = {
        "k": k,
        "prompts": prompts,
        "epsilon": epsilon,
        "epsilon_low": epsilon - 0.1,
        "epsilon_high": epsilon + 0.1,
        "bound_excluded": torch.zeros(n, dtype=torch.bool),
        "target_id": torch.arange(n),
        "state_index": torch.arange(n) // 2,
        "state_length": torch.full((n,), 8),
        "base_rank": ranks,
        "base_loss": torch.ones(n),
        "best_loss": torch.ones(n) / 2,
        "reached_as_text": k >= 0,
        "config": ReachabilityConfig(k_max=4),
        "labels": {
            "state_text": tuple(f"state <{i}>" for i in range(n)),
            "target_text": (" t",) * n,
            "prompt_text": (" a b ",) * n,
        },
    }
    return ReachabilityResult(**(fields | changes))


def test_the_curve_is_epsilon():
    result = result_of([0, 1, 4, -1])
    curve = figures(result)["k_epsilon"].data[-1]
    np.testing.assert_allclose(curve.y, [0.75, 0.5, 0.5, 0.5, 0.25])
    assert list(curve.x) == [0, 1, 2, 3, 4]


def test_the_table_has_reached_pairs_shortest_first_with_spaces_visible():
    table = figures(result_of([3, 1, -1, 0]))["prompts"].data[0].cells.values
    assert list(table[0]) == ["0", "1", "3"]
    assert table[1][0] == "\u2423a b\u2423"
    assert table[2][0] == "state &lt;3&gt;"


def test_the_results_table_has_the_ids_of_each_control_without_its_padding():
    table = result_of([3, 1, -1, 0]).table()
    assert table["prompt_ids"] == ["0 1 2", "0", "", ""]
    assert table["k"] == [3, 1, -1, 0]
    assert table["rank_without"] == [0, 10, 20, 30]


def test_pairs_that_were_not_reached_stand_above_the_longest_control():
    reached, missed = figures(result_of([3, -1]))["length_by_rank"].data
    assert list(missed.customdata) == [5]
    assert list(missed.x) == [11.0]
    assert abs(missed.y[0] - 5) < 0.3
    assert list(reached.customdata) == [3]


def test_the_bound_is_drawn_where_a_control_was_found():
    heads = {
        "head_orthogonal": torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        "head_limit": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "head_min_k": torch.tensor([[1, 9], [-1, 2]]),
    }
    result = result_of([2, -1], **heads)
    figure = figures(result)["bound"]
    assert [list(trace.y) for trace in figure.data[:2]] == [[1.0], [2.0]]
    assert result.metrics()["heads_excluded"] == pytest.approx(0.5)
    assert "bound" not in figures(result_of([0, -1], **heads))
    assert "bound" not in figures(result_of([2, -1]))


@pytest.mark.parametrize("k", [[0], [-1, -1], [1, 2, 3, 4, 0, -1]], ids=str)
def test_every_figure_says_n(k):
    result = result_of(k)
    for figure in figures(result).values():
        assert f"n = {len(k)} pairs" in figure.layout.title.subtitle.text
    assert finding(result).endswith(".")
    assert f"n = {len(k)} pairs" in finding(result)
