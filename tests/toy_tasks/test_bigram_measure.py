"""Measurements by hand, and ablations that do what their names say."""

import pytest
import torch

from tests.toy_tasks.test_model import build
from toy_tasks.bigram_ablations import ablations, ask_ablated
from toy_tasks.bigram_law import count_characters, make_law, sample
from toy_tasks.bigram_measure import (
    HeldOut,
    ask,
    logit_gap,
    logit_spread,
    mean_at,
    mean_by_token,
    observe,
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


@pytest.mark.parametrize("bias", ["none", "key", "sink-token"])
def test_ablations_do_what_they_say(held_out, bias):
    model = build(n_layers=2, bias=bias)
    for name, ablate in ablations(model):
        seen = {}

        def tap(site, x, ablate=ablate, seen=seen):
            seen[site] = ablate(site, x)
            return seen[site]

        model(held_out.tokens, tap=tap)
        kind, place = name.split(":")
        layer, head = int(place[1]), int(place[3:] or 0)
        if kind == "no_attention":
            assert seen[Site("attn_out", layer)].abs().max() == 0.0
        elif kind == "no_mlp":
            assert seen[Site("mlp_out", layer)].abs().max() == 0.0
        elif kind == "zero_head":
            z = seen[Site("z", layer)]
            assert z[:, :, head].abs().max() == 0.0
            assert z[:, :, 1 - head].abs().max() > 0.0
        else:
            pattern = seen[Site("pattern", layer)][:, head]
            assert torch.all(pattern[..., 0] == 1.0)
            assert pattern[..., 1:].abs().max() == 0.0


def test_ablations_are_named_as_in_the_contract():
    names = [name for name, _ in ablations(build(n_layers=1))]
    assert names == [
        "no_attention:L0",
        "no_mlp:L0",
        "zero_head:L0H0",
        "zero_head:L0H1",
        "head_to_bos:L0H0",
        "head_to_bos:L0H1",
    ]
    assert "no_mlp:L0" not in [name for name, _ in ablations(build(n_layers=1, d_mlp=0))]


def test_moving_a_head_to_bos_adds_the_value_of_bos_everywhere(held_out):
    """The exact rank-one identity: z becomes the value of <s> at every position."""
    model = build(n_layers=1, n_heads=1)
    move = dict(ablations(model))["head_to_bos:L0H0"]
    seen = {}

    def tap(site, x):
        seen[site] = move(site, x)
        return seen[site]

    model(held_out.tokens, tap=tap)
    wanted = seen[Site("v", 0)][:, :1].expand_as(seen[Site("z", 0)])
    assert torch.allclose(seen[Site("z", 0)], wanted, atol=1e-6)


def test_zeroing_the_only_head_is_skipping_attention(held_out):
    model = build(n_layers=1, n_heads=1)
    taps = dict(ablations(model))
    assert ask(model, held_out, taps["zero_head:L0H0"]) == pytest.approx(
        ask(model, held_out, taps["no_attention:L0"])
    )
    assert ask(model, held_out, taps["no_mlp:L0"]) != pytest.approx(ask(model, held_out))


def test_the_residual_peak_is_seen_under_the_ablation(held_out):
    model = build(n_layers=1)
    model.blocks[0].mlp[2].weight.data.zero_()
    plain = observe(model, held_out).resid_norm[1]
    wanted = (plain[0] / plain[1:].mean()).item()
    taps = dict(ablations(model))
    assert ask_ablated(model, held_out, taps["no_mlp:L0"], 1)[2] == pytest.approx(wanted)
    assert ask_ablated(model, held_out, taps["no_attention:L0"], 1)[2] != pytest.approx(wanted)
