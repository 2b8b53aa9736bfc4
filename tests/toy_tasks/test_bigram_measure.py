"""Measurements by hand and by a plain computation."""

import pytest
import torch

from tests.toy_tasks.test_model import build
from toy_tasks.bigram_law import count_characters, make_law, sample
from toy_tasks.bigram_measure import (
    HeldOut,
    logit_gap,
    logit_spread,
    mean_at,
    mean_by_token,
    observe,
    stationary_norm,
    token_spread,
)
from workbench.models.base import Site


@pytest.fixture(scope="module")
def held_out():
    law = make_law(count_characters("abcdefghij" * 3 + "aabbccddee" * 2), 2)
    assert law.d_vocab == 11
    return HeldOut.of(law, sample(law, 16, 12, torch.Generator().manual_seed(0)))


def test_the_logit_gap_leaves_out_the_query_itself_and_later_keys():
    scores = torch.tensor([[5.0, -9.0, -9.0, -9.0], [1.0, 7.0, -9.0, -9.0]])
    scores = torch.cat([scores, torch.tensor([[4.0, 1.0, 50.0, -9.0], [2.0, 1.0, 5.0, 50.0]])])
    assert logit_gap(scores[None, None]).flatten().tolist() == [0.0, 0.0, 3.0, -1.0]


def test_means_are_over_the_chosen_places_only():
    x = torch.tensor([[[1.0, 2.0, 30.0]], [[4.0, 50.0, 60.0]]])
    where = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_at(x, where).item() == pytest.approx(7 / 3)
    tokens = torch.tensor([[0, 2, 1], [2, 1, 1]])
    found = mean_by_token(x[:, 0], tokens, where, 3)
    assert found[[0, 2]].tolist() == [1.0, 3.0]
    assert found[1].isnan()


def test_concentrated_sink_logits_have_no_spread():
    scores = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    scores[..., 0] = 4.0
    where = torch.ones(2, 6, dtype=torch.bool)
    sink, other = logit_spread(scores, where)
    assert sink == 0.0
    assert 0.5 < other < 1.5


def test_sinks_are_judged_at_characters_that_are_no_triggers(held_out):
    where = held_out.judged()
    assert not where[:, :2].any()
    assert not (where & held_out.law.is_trigger[held_out.tokens]).any()
    assert where[:, 2:].float().mean() > 0.5


def test_observed_numbers_are_those_of_a_plain_computation(held_out):
    model = build(n_layers=2)
    seen = {}

    def tap(site, x):
        seen[site] = x.detach()
        return x

    model(held_out.tokens, tap=tap)
    found, where = observe(model, held_out), held_out.judged()
    pattern = seen[Site("pattern", 1)][:, 1, :, 0]
    assert found.sink_attention[1, 1].item() == pytest.approx(pattern[where].mean().item())
    w_o = model.blocks[0].attention.W_O.weight[:, :8]
    by_head = (seen[Site("v", 0)][:, 3, 0] @ w_o.T).norm(dim=-1).mean()
    alone = build(n_layers=1, n_heads=1)
    assert by_head > 0
    v = observe(alone, held_out).ov_norm
    assert v.shape == (12,)
    stream = seen[Site("resid_post", 1)].norm(dim=-1).mean(dim=0)
    assert torch.allclose(found.resid_norm[2], stream)
    assert found.bias_attention == 0.0


def test_ov_norms_are_taken_after_the_output_matrix(held_out):
    model = build(n_layers=1)
    before = observe(model, held_out).ov_norm
    model.blocks[0].attention.W_O.weight.data *= 3.0
    assert torch.allclose(observe(model, held_out).ov_norm, 3.0 * before, rtol=1e-4)


def test_attention_to_a_learned_key_is_what_the_tokens_do_not_get(held_out):
    model = build(n_layers=1, bias="key")
    assert 0.0 < observe(model, held_out).bias_attention < 1.0
    model.blocks[0].attention.k_bias.data.zero_()
    model.blocks[0].attention.W_Q.weight.data.zero_()
    share = (1.0 / (torch.arange(12) + 2.0)).expand(16, 12)[held_out.judged()].mean()
    assert observe(model, held_out).bias_attention == pytest.approx(share.item(), rel=1e-4)


def test_spread_over_tokens_leaves_out_what_differs_within_a_token():
    tokens = torch.tensor([[0, 1, 0, 1]])
    scores = torch.zeros(1, 1, 4, 4)
    scores[0, 0, :, 0] = torch.tensor([1.0, 5.0, 3.0, 7.0])  # means 2 and 6
    wanted = torch.tensor([2.0, 6.0, 2.0, 6.0]).std().item()
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert token_spread(scores, tokens, everywhere) == pytest.approx(wanted)
    two = torch.cat([scores, 3 * scores], dim=1)
    assert token_spread(two, tokens, everywhere) == pytest.approx(2 * wanted)
    once = torch.tensor([[True, False, True, False]])
    assert token_spread(scores, tokens, once) == 0.0


def test_the_stationary_value_cancels_what_the_other_tokens_add():
    """One query with half of its attention on <s>: the value of <s> must be minus the rest's mix."""
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.2, 0.3]])[None, None]
    v = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]])[None, :, None]
    w_o = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])[None]
    where = torch.tensor([[False, False, True]])
    mix = torch.tensor([0.2 * 1.0, 0.3 * 2.0]) @ w_o[0]
    found = stationary_norm(pattern, v, w_o, where)
    assert found.item() == pytest.approx((mix / 0.5).norm().item())
    at_rest = -mix / 0.5
    assert (0.5 * at_rest + mix).abs().max() < 1e-6
    none = pattern.clone()
    none[..., 0] = 0.0
    assert stationary_norm(none, v, w_o, where).isnan().all()


def test_the_pattern_that_is_kept_is_that_of_the_first_sequence(held_out):
    model = build(n_layers=2)
    seen = {}

    def tap(site, x):
        seen[site] = x.detach()
        return x

    model(held_out.tokens[:1], tap=tap)
    found = observe(model, held_out).pattern
    assert found.shape == (2, 2, 12, 12)
    assert torch.allclose(found[1], seen[Site("pattern", 1)][0], atol=1e-6)
