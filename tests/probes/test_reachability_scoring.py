"""Scores and gradients of controls on a bag of tokens, and how many rows a forward pass is given."""

import dataclasses

import pytest
import torch

from probes.reachability_scoring import Scorer, cached_tokens, token_gradients
from tests.probes.bag_model import BagModel, bag
from workbench.errors import CapabilityError, ConfigError
from workbench.models.memory import forward_bytes, gradient_bytes

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


# How much at once


def spec_of(**sizes):
    return dataclasses.replace(bag(8).spec, **sizes)


def test_a_pass_keeps_its_widest_activation_in_a_processors_cache():
    # 2 MiB of float32: the MLP's, or queries, keys and values together.
    assert cached_tokens(spec_of(d_mlp=100, d_model=10)) == 2**21 // 400
    assert cached_tokens(spec_of(d_mlp=100, d_model=50)) == 2**21 // 600
    assert cached_tokens(spec_of(d_mlp=0, d_model=50)) == 2**21 // 600
    assert cached_tokens(spec_of(d_mlp=2000, d_model=8)) == 512
    model = bag(8)
    model.spec = spec_of(d_mlp=100, d_model=10)
    assert Scorer(model, 1 << 40).rows_at_once(1000) == 5
    assert Scorer(model, 1 << 40).rows_at_once(6000) == 1
    assert Scorer(model, 0).rows_at_once(3) == 1


def test_weights_in_half_precision_leave_less_of_the_budget():
    model, whole = bag(8), bag(8)
    per_row = forward_bytes(model.spec, 5)
    model.dtype = "bfloat16"
    # The embedding is read in float32 beside it: 4 bytes, 8 tokens, 8 dimensions.
    copied = 4 * 8 * 8
    assert Scorer(model, 10 * per_row + copied).rows_at_once(5) == 10
    assert Scorer(model, 10 * per_row + copied - 1).rows_at_once(5) == 9
    assert Scorer(whole, 10 * per_row).rows_at_once(5) == 10


def test_gradients_have_a_budget_of_their_own_and_one_over_it_is_told(caplog):
    model = bag(8)
    needed = gradient_bytes(model.spec, 5)
    assert Scorer(model, 3 * needed).problems_at_once(5) == 3
    assert Scorer(model, needed).problems_at_once(5) == 1
    assert not caplog.records
    assert Scorer(model, needed - 1).problems_at_once(5) == 1
    assert "the gradient of a prompt of 5 tokens" in caplog.text


@pytest.mark.parametrize(("most", "passes"), [(6, [6, 6]), (5, [3, 3, 3, 3]), (2, [1] * 12)])
def test_after_an_overflow_half_as_many_rows_go_at_once(most, passes):
    model = bag(8, most_rows=most)
    rows = torch.arange(36).view(12, 3) % 8
    scorer = Scorer(model, 1 << 20, most_rows=12)
    scorer.score(rows, rows[:, 0])
    assert model.passes == passes
    assert scorer.n_scored == 12
    # In bytes: longer rows get fewer too.
    fits = passes[0] * forward_bytes(model.spec, 3) // forward_bytes(model.spec, 30)
    assert scorer.rows_at_once(30) == max(1, fits)


def test_every_row_for_every_target():
    model = bag(8)
    rows, targets = torch.tensor([[1, 2], [3, 3], [0, 5]]), torch.tensor([4, 0, 7])
    found = Scorer(model, 1 << 20, most_rows=2).sweep(rows, targets)
    logits = model.effect[rows].sum(dim=1)
    torch.testing.assert_close(found.loss, -logits.log_softmax(dim=-1)[:, targets])
    assert torch.equal(found.winner, logits.argmax(dim=-1))
    assert model.passes == [2, 1]


def test_groups_of_several_lengths_come_back_in_their_order():
    model = bag(8)
    groups = [
        (torch.tensor([[1, 2, 3], [3, 3, 1]]), 4),
        (torch.tensor([[5]]), 0),
        (torch.tensor([[0, 5, 6]]), 7),
        (torch.tensor([[2], [6], [7]]), 1),
    ]
    found = Scorer(model, 1 << 20).score_groups(groups)
    assert model.passes == [4, 3]  # those of one length together
    for (rows, target), scores in zip(groups, found, strict=True):
        logits = model.effect[rows].sum(dim=1)
        torch.testing.assert_close(scores.loss, -logits.log_softmax(dim=-1)[:, target])
        assert torch.equal(scores.winner, logits.argmax(dim=-1))


def test_two_tokens_that_tie_for_the_argmax_are_both_no_winner():
    effect = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    found = Scorer(BagModel(effect), 1 << 20).score(torch.tensor([[0], [1], [2]]), ROWS[0])
    assert found.winner.tolist() == [-1, 0, -1]


def test_gradients_are_of_the_places_that_are_asked():
    model = bag(9)
    weight = torch.tensor([1.0, 3.0, 0.5])  # of each position, so that places differ

    def continue_from(layer, resid, attention_mask=None, *, last=None):
        return ((resid * weight[:, None]) @ model.effect).cumsum(dim=1)[:, -last:]

    model.continue_from = continue_from
    rows, targets = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 7])
    logits = (model.effect[rows] * weight[:, None]).sum(dim=1)
    away = logits.softmax(-1) - torch.nn.functional.one_hot(targets, 9)
    expected = torch.einsum("p,nv,tv->npt", weight, away, model.effect)
    for where in (slice(0, 1), slice(1, 3)):
        found = token_gradients(model, rows, targets, where)
        torch.testing.assert_close(found, expected[:, where])


def test_embeddings_of_another_width_have_no_gradient_search():
    model = bag(9)
    model.weight = lambda name: torch.eye(8)
    with pytest.raises(CapabilityError, match="those of bag are 8 wide for 9"):
        token_gradients(model, torch.tensor([[1, 2]]), torch.tensor([0]), slice(0, 1))
