"""k-epsilon curves, by hand and on the authors' own rows."""

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.reachability_epsilon import epsilon_curve, epsilon_interval

SHARED = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = SHARED / "reference" / "magic_words" / "results_deep_dive_falcon-7b_dive1.csv"


def test_curve_counts_the_pairs_that_no_control_of_at_most_k_reaches():
    found = epsilon_curve(torch.tensor([0, 2, -1, 3]), 4)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.75, 0.5, 0.25, 0.25]))


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=30))
def test_curve_never_rises_and_ends_at_the_share_not_reached(lengths):
    curve = epsilon_curve(torch.tensor(lengths), 6)
    assert (curve.diff() <= 0).all()
    assert curve[-1].item() == pytest.approx(sum(k < 0 for k in lengths) / len(lengths))


def test_published_rows_give_the_published_share():
    # Card section 4: 616 uniform targets on Falcon-7b, 46.43 % within 10 tokens.
    if not PUBLISHED.exists():
        pytest.skip(f"needs shared/data/reference ({PUBLISHED.name})")
    with PUBLISHED.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    k = [int(row["prompt_length"]) if row["prompt_correct"] == "True" else -1 for row in rows]
    assert len(k) == 616
    reached = 1 - epsilon_curve(torch.tensor(k), 10)
    assert round(100 * reached[10].item(), 2) == 46.43
    expected = {0: 0.0049, 2: 0.0308, 3: 0.0747, 4: 0.151, 6: 0.2857, 8: 0.3782}
    for length, share in expected.items():
        assert reached[length].item() == pytest.approx(share, abs=6e-5)


def test_interval_resamples_states_not_pairs():
    # 4 states of 75 alike pairs: two are reached whole. All four draws miss both with 1/16 > 2.5 %.
    k = torch.tensor([1, 1, -1, -1]).repeat_interleave(75)
    state = torch.arange(4).repeat_interleave(75)
    low, high = epsilon_interval(k, 1, state, torch.Generator().manual_seed(0))
    assert (low[1].item(), high[1].item()) == (0.0, 1.0)
    alone = epsilon_interval(k, 1, torch.arange(300), torch.Generator().manual_seed(0))
    # Independent pairs: 0.5 +- 1.96 sqrt(0.25 / 300).
    assert alone[0][1].item() == pytest.approx(0.5 - 0.0566, abs=0.01)
    assert alone[1][1].item() == pytest.approx(0.5 + 0.0566, abs=0.01)


def test_one_state_has_no_spread():
    low, high = epsilon_interval(
        torch.tensor([0, -1]), 1, torch.tensor([7, 7]), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(low, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(high, low)
