"""The permutation test, its correction and the classes, on numbers worked by hand and by scipy."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.active_dormant_statistics import (
    Domains,
    adjusted,
    check_prompts,
    choose_permutations,
    classes,
    domains_of,
    dormant_heads,
    judged,
    n_relabellings,
    permutation_p,
    prompts_needed,
    range_of_means,
)
from workbench.context import Context
from workbench.errors import ConfigError, DataError

TWO = Domains(("a", "b"), torch.tensor([0, 0, 1, 1]))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# Means and the test


def test_means_by_domain_leave_nan_out():
    x = torch.tensor([[1.0, 4.0], [3.0, math.nan], [5.0, 6.0], [9.0, 8.0]])
    assert TWO.mean(x).tolist() == [[2.0, 4.0], [7.0, 7.0]]
    assert TWO.sizes.tolist() == [2, 2]


def test_range_of_means_of_three_domains():
    x = torch.tensor([[1.0], [2.0], [6.0]])
    assert range_of_means(x, torch.tensor([[0, 1, 2]]), 3).tolist() == [[5.0]]


def test_p_of_two_against_two_is_a_third():
    # Of the 6 ways to choose two of four prompts, 2 have a difference as large as (0, 0 | 1, 1).
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    p = permutation_p(x, TWO, 20_000, draw()).item()
    assert p == pytest.approx(1 / 3, abs=0.015)


def test_p_counts_every_relabelling_of_equal_prompts():
    assert permutation_p(torch.full((4, 1), 0.1), TWO, 99, draw()).item() == 1.0


def exact_p(x, n_first):
    """Over all relabellings of two domains, by the definition."""
    members = set(range(len(x)))
    ranges = []
    for chosen in combinations(range(len(x)), n_first):
        rest = list(members - set(chosen))
        ranges.append(abs(float(x[list(chosen)].mean()) - float(x[rest].mean())))
    return sum(value >= ranges[0] - 1e-12 for value in ranges) / len(ranges)


@given(seed=st.integers(0, 1000), n_first=st.integers(2, 5), n_second=st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_p_is_that_of_all_relabellings(seed, n_first, n_second):
    x = torch.randn(n_first + n_second, 3, generator=draw(seed), dtype=torch.float64)
    x[n_first:, 0] += 2.0
    domains = Domains(("a", "b"), torch.tensor([0] * n_first + [1] * n_second))
    found = permutation_p(x.float(), domains, 4000, draw(1))
    expected = torch.tensor([exact_p(x[:, head], n_first) for head in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.04)


def test_p_agrees_with_scipy():
    from scipy.stats import permutation_test

    x = torch.randn(12, 2, generator=draw(3), dtype=torch.float64)
    x[:5] += 0.8
    domains = Domains(("a", "b"), torch.tensor([0] * 5 + [1] * 7))
    found = permutation_p(x, domains, 20_000, draw())

    def difference(first, second, axis):
        return abs(first.mean(axis) - second.mean(axis))

    for head in range(2):
        parts = x[:5, head].numpy(), x[5:, head].numpy()
        exact = permutation_test(
            parts, difference, vectorized=True, n_resamples=math.inf, alternative="greater"
        )
        assert found[head].item() == pytest.approx(exact.pvalue, abs=0.012)


def test_without_a_difference_p_is_uniform():
    domains = Domains(("a", "b"), torch.arange(24) % 2)
    x = torch.randn(24, 1000, generator=draw(5))
    p = permutation_p(x, domains, 999, draw(6))
    for level in (0.05, 0.2, 0.5):
        # Standard deviation of a share of 1000: at most 0.016.
        assert (p <= level).float().mean().item() == pytest.approx(level, abs=0.05)
    assert (adjusted(p) <= 0.05).sum() == 0


@given(order=st.permutations(range(8)))
@settings(max_examples=10, deadline=None)
def test_order_of_prompts_does_not_matter(order):
    x = torch.randn(8, 2, 3, generator=draw(2))
    x[:4, 0] += 3.0
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    whole = permutation_p(x, Domains(("a", "b"), index), 2000, draw(1))
    order = list(order)
    shuffled = permutation_p(x[order], Domains(("a", "b"), index[order]), 2000, draw(1))
    torch.testing.assert_close(shuffled, whole, rtol=0, atol=0.05)


# False discoveries


def test_adjusted_values_worked_by_hand():
    # m p / rank: 0.04, 0.06, 0.0533, 0.5; the second takes the smaller value of the third.
    p = torch.tensor([[0.04, 0.01], [0.5, 0.03]])
    expected = torch.tensor([[4 * 0.04 / 3, 0.04], [0.5, 4 * 0.04 / 3]])
    torch.testing.assert_close(adjusted(p), expected)


def test_adjusted_values_agree_with_scipy():
    from scipy.stats import false_discovery_control

    p = torch.rand(7, 9, generator=draw()) ** 3
    expected = torch.tensor(false_discovery_control(p.flatten().double().numpy())).view(7, 9)
    torch.testing.assert_close(adjusted(p), expected.float())


# How many prompts


def brute_force_relabellings(sizes):
    """Partitions that a range of means can tell apart: sets of groups, their names forgotten."""
    from itertools import permutations

    index = [d for d, size in enumerate(sizes) for _ in range(size)]
    found = set()
    for labels in set(permutations(index)):
        groups = frozenset(
            frozenset(i for i, label in enumerate(labels) if label == d) for d in range(len(sizes))
        )
        found.add(groups)
    return len(found)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (3, 3), (2, 2, 2), (1, 2, 3)])
def test_relabellings_that_can_be_told_apart(sizes):
    assert n_relabellings(torch.tensor(sizes)) == brute_force_relabellings(sizes)


def test_prompts_that_are_needed():
    # Two domains of 3: C(6, 3) / 2 = 10 relabellings, p >= 0.1; of 4: 35.
    assert prompts_needed(2, 0.1) == 3
    assert prompts_needed(2, 0.05) == 4
    assert prompts_needed(3, 0.05) == 3


def test_too_few_prompts_are_refused_with_the_number():
    with pytest.raises(DataError, match=r"at least 4 prompts a domain.*got 2 of a, 2 of b"):
        check_prompts(TWO, 0.05)
    check_prompts(TWO, 0.5)
    # A small domain beside a large one has relabellings enough.
    check_prompts(Domains(("a", "b"), torch.tensor([0] + [1] * 30)), 0.05)


def test_relabellings_suffice_for_one_head_alone():
    assert choose_permutations(None, 144, 0.05) == 9_999
    assert choose_permutations(None, 1024, 0.05) == 20_480
    assert choose_permutations(3000, 144, 0.05) == 3000
    with pytest.raises(ConfigError, match="at least 2880"):
        choose_permutations(2000, 144, 0.05)


@pytest.mark.parametrize(
    "context",
    [
        Context(),
        Context(labels={"domain": ("code", "code")}),
        Context(rows=({"text": "x"}, {"text": "y"})),
        Context(rows=({"domain": "code"}, {"domain": "code"})),
    ],
    ids=["none", "one name", "rows without", "rows of one"],
)
def test_one_domain_is_refused(context):
    with pytest.raises(DataError, match=r"two or more domains.*--data NAME=FILE"):
        domains_of(context)


def test_domains_come_in_the_order_of_the_prompts():
    found = domains_of(Context(labels={"domain": ("code", "prose", "code")}))
    assert found.names == ("code", "prose")
    assert found.index.tolist() == [0, 1, 0]


def test_domains_may_be_a_column_of_the_rows():
    rows = ({"domain": "b"}, {"domain": 1}, {"domain": "b"})
    assert domains_of(Context(rows=rows)).names == ("b", "1")
    with pytest.raises(DataError, match=r"every row must have a domain.*row 1"):
        domains_of(Context(rows=({"domain": "b"}, {"text": "x"})))


# Classes


def test_a_cut_between_domains_needs_a_difference():
    sink = torch.tensor([[[0.52, 0.52, 0.9]], [[0.46, 0.46, 0.9]]])
    differs = torch.tensor([[True, False, False]])
    loss = torch.zeros_like(sink)
    dormant = dormant_heads(judged(sink, differs), loss, 0.5, 0.01)
    # The second head's mean, 0.49, is below the threshold: active in both.
    assert dormant[:, 0].tolist() == [[True, False, True], [False, False, True]]
    found = classes(dormant)
    assert {name: heads.tolist() for name, heads in found.items()} == {
        "always active": [[False, True, False]],
        "active-dormant": [[True, False, False]],
        "always dormant": [[False, False, True]],
    }


def test_a_head_that_is_missed_is_not_dormant():
    sink = torch.full((1, 1, 4), 0.9)
    loss = torch.tensor([[[-0.5, 0.0, 0.01, 0.011]]])
    assert dormant_heads(sink, loss, 0.5, 0.01).tolist() == [[[True, True, True, False]]]
    assert not dormant_heads(torch.full((1, 1, 1), 0.5), loss[..., :1], 0.5, 0.01).any()
