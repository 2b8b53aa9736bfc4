"""The probe of the last digit on tens and series that it has not seen, worked out beside it."""

import pytest
import torch

from probes.successor_heads_digits import study_digits
from probes.successor_heads_features import SaeSettings, Span, fit_probe, held_out_accuracy
from probes.successor_heads_scores import Vocabulary
from probes.successor_heads_tokens import Series, TokenSet, TokenSets
from workbench.context import Context

LINE = Series("line", tuple("abcdefg"))
RING = Series("ring", tuple("uvwxyz"), cyclic=True)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NUMBERS = Series("numbers", tuple(str(i) for i in range(1, 101)))


def digits_of(index):
    """What is found on random representations of some numbers and of two other series."""
    sets = [
        TokenSet(NUMBERS, "space", index, tuple(range(len(index)))),
        TokenSet(LINE, "space", (1, 2, 3, 4, 5, 6, 7), tuple(range(7))),
        TokenSet(RING, "space", (1, 2, 3), tuple(range(3))),
    ]
    n_tokens = sum(len(one.ids) for one in sets)
    vocabulary = Vocabulary(tuple(sets), drawn(n_tokens, 6), drawn(6, n_tokens, seed=1))
    head = (drawn(6, 4, seed=2), drawn(4, 6, seed=3))
    sae = (SaeSettings(12, 0.03, 2), 1, 1.0)
    return study_digits(TokenSets(tuple(sets)), vocabulary, head, sae, Context()), vocabulary


def test_the_probe_is_tried_on_tens_and_series_that_it_has_not_seen():
    index = tuple(range(1, 61))
    found, vocabulary = digits_of(index)
    x, residue = vocabulary.reps[:60], torch.tensor(index) % 10
    span = Span.of(x)
    probe = fit_probe(span.coordinates(x), residue)
    held_out = held_out_accuracy(span.coordinates(x), torch.tensor(index))
    said = (span.coordinates(vocabulary.reps[60:]) @ probe.weight.T + probe.bias).argmax(dim=1)
    right = (said == torch.tensor([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])).float()
    expected = [held_out, float(right[:7].mean()), float(right[7:].mean())]
    assert found.probe_accuracy.tolist() == pytest.approx(expected)
    assert found.numbers["probe_accuracy_held_out_tens"] == pytest.approx(held_out)
    fitted = probe.accuracy(span.coordinates(x), residue)
    assert found.numbers["probe_accuracy_fitted"] == pytest.approx(fitted)
    assert fitted > held_out
    assert found.numbers["probe_accuracy"] == pytest.approx(float(right.mean()))
    assert found.numbers["probe_tokens"] == 10.0


def test_without_tens_to_hold_out_numbers_have_no_accuracy():
    # The ones and the fifties lie in one fold: without them no other digit than 0 is left.
    found, _ = digits_of((*range(1, 11), *range(51, 61)))
    assert found.probe_accuracy.isnan().tolist() == [True, False, False]
    assert "probe_accuracy_held_out_tens" not in found.numbers
    assert found.steering.sources[:2] == ("numbers: 1", "numbers: 2")
