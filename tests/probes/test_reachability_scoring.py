"""Scores and gradients of controls on a bag of tokens, and how many rows a forward pass is given."""

import pytest
import torch

from probes.reachability_scoring import Scorer, token_gradients
from tests.probes.bag_model import bag
from workbench.errors import ConfigError
from workbench.models.memory import forward_bytes

ROWS = torch.zeros(2, 3, dtype=torch.long)


def test_token_gradients_rank_tokens_as_their_true_effect():
    model = bag(9)
    rows, targets = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 7])
    found = token_gradients(model, rows, targets, slice(0, 2))
    logits = model.effect[rows].sum(dim=1)
    away = logits.softmax(-1) - torch.nn.functional.one_hot(targets, 9)
    expected = torch.einsum("nv,tv->nt", away, model.effect)
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2, -1))


def test_rows_that_do_not_fit_are_halved_until_they_do():
    model = bag(8, most_rows=3)
    rows = torch.arange(36).view(12, 3) % 8
    found = Scorer(model, 1 << 20, most_rows=12).score(rows, torch.arange(12) % 8)
    assert model.passes == [3, 3, 3, 3]  # 12 and 6 did not fit
    expected = model.effect[rows].sum(dim=1)
    assert torch.equal(found.winner, expected.argmax(dim=-1))
    at = expected.log_softmax(dim=-1)[torch.arange(12), torch.arange(12) % 8]
    torch.testing.assert_close(found.loss, -at)


def test_one_row_that_does_not_fit_is_an_error_in_one_line():
    with pytest.raises(ConfigError, match="one prompt must fit in memory"):
        Scorer(bag(8, most_rows=0), 1 << 20).score(ROWS, ROWS[:, 0])


def test_other_errors_of_a_forward_pass_are_not_swallowed():
    model = bag(8)
    model.logits = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Scorer(model, 1 << 20).score(ROWS, ROWS[:, 0])


def test_the_budget_decides_how_many_rows_go_at_once():
    model = bag(8)
    per_row = forward_bytes(model.spec, 5)
    assert Scorer(model, 10 * per_row).rows_at_once(5) == 10
    assert Scorer(model, 10 * per_row, most_rows=4).rows_at_once(5) == 4
    assert Scorer(model, 10 * per_row).rows_at_once(20) < 10
