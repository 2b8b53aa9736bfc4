"""A search that is killed (SIGKILL) in the middle of a batch does at most one problem's work again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.probes.killed_searches import KEY, ONE_PROBLEM, SEARCHES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("share", [pytest.param(0.3, marks=pytest.mark.slow), 0.8])
@pytest.mark.parametrize(
    "search",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "activations" else name
        for name in SEARCHES
    ],
)
def test_a_kill_in_the_middle_of_a_batch_costs_at_most_one_problem(search, share, tmp_path):
    expected, whole = SEARCHES[search](None, 10**9)
    assert whole.widest > 3  # problems in one pass, or rows of as many
    killed_at = int(share * whole.done)
    command = [sys.executable, "-m", "tests.probes.killed_searches", search]
    killed = subprocess.run([*command, tmp_path, str(killed_at)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "pieces" / KEY).glob("*.draft"))
    found, rest = SEARCHES[search](tmp_path, 10**9)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert killed_at + rest.done - whole.done <= ONE_PROBLEM[search]
