"""Which columns of a tile are taken: a run, and a few before it."""

import pytest
import torch

from workbench.interventions.columns import Columns

N_KEYS = 40


def where(*chosen):
    """Columns of two prompts and three heads, each key chosen in another head of another prompt."""
    here = torch.zeros(2, 3, N_KEYS, dtype=torch.bool)
    for number, key in enumerate(chosen):
        here[number % 2, number % 3, key] = True
    return Columns.where(here)


@pytest.mark.parametrize(
    ("chosen", "few", "run"),
    [
        ((), None, (0, 0)),
        ((0,), None, (0, 1)),
        ((39,), None, (39, 40)),
        ((4, 5, 6), None, (4, 7)),
        ((4, 6, 8, 10), None, (4, 11)),  # every second one: as a run
        ((0, 3), None, (0, 4)),  # more than half as many as they span
        ((0, 4), [0], (4, 5)),  # half as many
        ((0, 20, 22, 23), [0], (20, 24)),  # a run goes over one that is not chosen
        ((0, 20, 23, 24), [0, 20], (23, 25)),  # but not over two
        ((0, 10, 11, 30, 31, 32), [0, 10, 11], (30, 33)),  # and it is the last one
    ],
)
def test_keys_that_stand_close_are_a_run_and_those_before_a_few(chosen, few, run):
    found = where(*chosen)
    assert (None if found.few is None else found.few.tolist()) == few
    assert found.run == slice(*run)
    taken = found.of(torch.arange(N_KEYS)).tolist()
    assert taken == [*(few or []), *range(*run)]
    assert set(chosen) <= set(taken)


@pytest.mark.parametrize("chosen", [(), (5,), (4, 6, 7), (0, 20, 23, 24)])
def test_what_is_put_in_stands_where_it_was_taken_and_nowhere_else(chosen):
    columns, x = where(*chosen), torch.arange(2.0 * N_KEYS).view(2, N_KEYS)
    changed = x.clone()
    columns.put(changed, -columns.of(x))
    taken = columns.of(torch.arange(N_KEYS))
    expected = x.clone()
    expected[:, taken] *= -1
    assert torch.equal(changed, expected)
