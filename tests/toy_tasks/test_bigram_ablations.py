"""Ablations that do what their names say, and the minimal circuit of three blocks."""

import pytest
import torch

from tests.toy_tasks.test_model import build
from toy_tasks.bigram_ablations import ablations, ask_ablated, ask_circuit, circuits
from toy_tasks.bigram_law import count_characters, make_law, sample
from toy_tasks.bigram_measure import HeldOut, ask, observe
from workbench.models.base import Site


@pytest.fixture(scope="module")
def held_out():
    law = make_law(count_characters("abcdefghij" * 3 + "aabbccddee" * 2), 2)
    return HeldOut.of(law, sample(law, 16, 12, torch.Generator().manual_seed(0)))


def sites_under(model, tokens, tap):
    seen = {}

    def keep(site, x):
        seen[site] = tap(site, x)
        return seen[site]

    model(tokens, tap=keep)
    return seen


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


def test_a_circuit_needs_three_blocks(held_out):
    assert circuits(1) == circuits(2) == {}
    assert list(circuits(3)) == list(circuits(4)) == ["whole", "minimal", "no_block:L0"]


def test_circuits_take_away_late_attention_and_then_the_first_block(held_out):
    model = build(n_layers=4)
    taps = circuits(4)
    minimal = sites_under(model, held_out.tokens, taps["minimal"])
    assert all(minimal[Site("attn_out", layer)].abs().max() == 0.0 for layer in (2, 3))
    assert all(minimal[Site("attn_out", layer)].abs().max() > 0.0 for layer in (0, 1))
    assert all(minimal[Site("mlp_out", layer)].abs().max() > 0.0 for layer in range(4))
    none = sites_under(model, held_out.tokens, taps["no_block:L0"])
    assert torch.equal(none[Site("resid_post", 0)], none[Site("resid_pre", 0)])
    assert none[Site("attn_out", 1)].abs().max() > 0.0
    assert none[Site("attn_out", 3)].abs().max() == 0.0


def test_circuit_numbers_are_those_of_the_blocks_they_name(held_out):
    model = build(n_layers=3)
    found, whole = ask_circuit(model, held_out, circuits(3)["whole"]), observe(model, held_out)
    assert found.backcopy_risk == whole.backcopy_risk
    assert found.sink_logit_gap == pytest.approx(whole.sink_logit_gap[1].mean().item())
    assert found.value_norm_bos == whole.ov_norm_by_layer[1, 0].item()
    after = sites_under(model, held_out.tokens, lambda site, x: x)[Site("resid_post", 0)]
    norm = after.norm(dim=-1).mean(dim=0)
    excess = (norm[0] - norm[1:].mean()).item()
    assert found.resid_norm_excess == pytest.approx(excess, abs=1e-5)
    skipped = ask_circuit(model, held_out, circuits(3)["minimal"])
    one = dict(ablations(model))["no_attention:L2"]
    assert skipped[:2] == pytest.approx(ask(model, held_out, one))
