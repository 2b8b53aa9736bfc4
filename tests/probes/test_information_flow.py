"""Information flow: planted toys, causal zeros, and flow both ways in encoders."""

import pytest
import torch

import workbench as wb
from probes.information_flow_cross import pair_mask
from tests.probes.flow_prompts import PLAIN, TEXTS, TWO_ITEMS, encoder, random_rows, run
from tests.probes.planted_flow import copying_toy, rows_of
from tests.zoo import tiny_model

# Planted structure


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_one_token_that_carries_an_item_is_representative(layer):
    # The other tokens of the item are as long as a pad: 0.
    silent = {9: 0.0, 10: 0.0, 12: 0.0}
    model = copying_toy({}, gain=0.0, strength=silent)
    rows = rows_of(([1, 9, 5, 10, 2, 6, 12, 3], [[9, 5, 10], [6, 12]]))
    result = run(model, rows, layer=layer, **PLAIN)
    assert result.representative[0].nonzero()[:, 0].tolist() == [2, 5]
    assert result.keep_score[0, [2, 5]].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert result.keep_score[0, [1, 3, 6]].abs().max() < 1e-5
    found = result.metrics()
    assert found["representative_rate"] == 1.0
    assert found["redundant_rate"] == pytest.approx(3 / 5)
    assert found["last_token_rate"] == 0.0
    # Removing the other three leaves every item readable.
    assert (found["accuracy_before"], found["accuracy_after"]) == (1.0, 1.0)


def test_tokens_that_share_an_item_equally_are_not_representative():
    # Two orthogonal tokens score 1 / sqrt 2 each: below 0.8, above 0.7.
    model = copying_toy({}, gain=0.0)
    rows = rows_of(([1, 5, 6, 2, 7, 3], [[5, 6], [7]]))
    result = run(model, rows, layer=0, **PLAIN)
    assert result.representative[0].nonzero()[:, 0].tolist() == [4]
    assert result.keep_score[0, 1].item() == pytest.approx(0.5**0.5, abs=0.02)
    assert run(model, rows, layer=0, tau=0.6, **PLAIN).representative[0, 1:3].all()


@pytest.mark.parametrize("block", [0, 1])
def test_a_planted_leak_flips_the_reading_and_its_repair_restores_it(block):
    # Position 3 copies position 1, four times as strong as its own: 0.2 own, 0.8 other.
    model = copying_toy({3: 1}, gain=4.0 / 3.0, layer=block)
    result = run(model, TWO_ITEMS, layer=2, **PLAIN)
    assert result.correct.tolist() == [[True, False]] * 2
    assert result.correct_patched.all()
    assert result.metrics()["leakage_rate"] == 0.5
    assert result.metrics()["leakage_rate_patched"] == 0.0
    assert result.metrics()["leakage_reduction"] == 1.0
    assert (result.leak_score[:, 1, 0] > 0.5).all()
    # Patched before block 1, a leak of block 1 comes back, one of block 0 does not.
    early = run(model, TWO_ITEMS, layer=1, **PLAIN)
    assert early.metrics()["leakage_rate_patched"] == (0.5 if block == 1 else 0.0)


@pytest.mark.parametrize("block", [0, 1])
def test_the_sweep_finds_the_block_that_leaks(block):
    model = copying_toy({3: 1}, gain=1.0, layer=block)
    result = run(model, TWO_ITEMS, knockout=True, **PLAIN)
    by_layer = result.flow_by_layer
    assert by_layer[:, 1 - block].abs().max() < 1e-6
    # One of the two ordered pairs has flow: the mean over pairs is half of it.
    torch.testing.assert_close(by_layer[:, block], result.flow[:, 1, 0] / 2)
    assert (result.flow[:, 1, 0] > 0.3).all()
    assert (result.flow_direct[:, 1, 0] > 0.3).all()


def test_a_way_round_is_no_direct_flow():
    # Position 3 copies position 2, which is no item: block 0 brings position 1 there.
    first, second = copying_toy({2: 1}, layer=0), copying_toy({3: 2}, layer=1)
    toy = first.model
    with torch.no_grad():
        wanted = dict(second.model.blocks[1].named_parameters())
        for name, parameter in toy.blocks[1].named_parameters():
            parameter.copy_(wanted[name])
    result = run(wb.wrap(toy), TWO_ITEMS, knockout=True, **PLAIN)
    assert (result.flow[:, 1, 0] > 0.1).all()
    assert (result.flow_direct == 0).all()
    assert (result.flow_by_layer.sum(dim=1) > 0.05).all()


def test_nothing_flows_where_nothing_is_copied():
    result = run(copying_toy({}), TWO_ITEMS, knockout=True, **PLAIN)
    for name in ("flow", "leak_score", "flow_by_layer", "flow_direct"):
        assert float(getattr(result, name).abs().max()) == 0.0, name
    assert result.metrics()["leakage_rate"] == 0.0
    torch.testing.assert_close(result.clean_cosine, torch.ones(2, 2))


# Causal and bidirectional models


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "mamba"])
def test_nothing_flows_to_earlier_items_in_a_causal_model(family):
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    result = run(wb.wrap(tiny_model(family, **options)), random_rows())
    earlier = torch.ones(3, 3).triu(1).bool()
    assert float(result.flow[:, earlier].max()) == 0.0
    assert float(result.leak_score[:, earlier].abs().max()) == 0.0
    assert float(result.flow[:, earlier.T].min()) > 0.0


def test_items_flow_both_ways_in_t5_and_forward_only_in_clip(tmp_path):
    both = run(encoder("t5", tmp_path / "t5"), TEXTS)
    pairs = pair_mask(both.measured.exists())
    assert float(both.flow[pairs].min()) > 1e-4
    causal = run(encoder("clip", tmp_path / "clip"), TEXTS, knockout=True)
    earlier = pairs & torch.ones(3, 3).triu(1).bool()
    assert float(causal.flow[earlier].max()) == 0.0
    assert float(causal.flow_direct[earlier].max()) == 0.0
    assert float(causal.flow[pairs & ~earlier].min()) > 1e-4


def test_single_items_have_no_leakage_to_speak_of():
    rows = rows_of(([1, 5, 2], [[5]]))
    found = run(copying_toy({}), rows, **PLAIN).metrics()
    assert "leakage_rate" not in found
    assert found["representative_rate"] == 1.0
