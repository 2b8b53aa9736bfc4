"""Information flow: what must hold for any model, order, batch, padding and backend."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.information_flow import InformationFlowConfig, measure_information_flow
from probes.information_flow_cross import encode_alone, measure_left, pair_mask
from probes.information_flow_encoding import (
    END,
    PadEncodings,
    common_direction,
    without_direction,
)
from probes.information_flow_items import Padding
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.probes.flow_prompts import TEXTS, encoded_batch, encoder, random_rows, run
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context


@pytest.mark.parametrize("layer", [0, 1])
def test_keeping_everything_is_the_prompt_bit_for_bit_and_keeping_nothing_the_pads(layer):
    encoded = encoded_batch(layer)
    everyone = torch.arange(2)
    keep = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(encoded.patched_end(everyone, keep, encoded.pad_layer), encoded.end)
    nothing = encoded.patched_end(everyone, ~keep, encoded.pad_layer)
    torch.testing.assert_close(nothing, encoded.pad_end, rtol=0, atol=1e-5)
    assert float(encoded.read(everyone, ~keep).abs().max()) == 0.0


def test_a_patch_at_the_end_is_a_choice_of_positions():
    encoded = encoded_batch()
    keep = encoded.places.mask()[:, 0]
    found = encoded.patched_end(torch.arange(2), keep, encoded.pad_end, layer=2)
    assert torch.equal(found[:, 1:3], encoded.end[:, 1:3])
    assert torch.equal(found[:, 3:], encoded.pad_end[:, 3:])


def test_the_same_prompt_as_clean_prompt_changes_nothing():
    encoded = encoded_batch()
    own = encoded.places.mask()[:, 0]
    same = encoded.model.capture(encoded.tokens, ["L1.resid_pre"])["L1.resid_pre"]
    found = encoded.patched_end(torch.arange(2), ~own, same)
    assert torch.equal(found, encoded.end)


def test_flow_by_layer_sums_to_the_mean_flow_of_a_prompt():
    result = run(wb.wrap(tiny_model("llama")), random_rows())
    pairs = pair_mask(result.measured.exists())
    mean = (result.flow * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))
    torch.testing.assert_close(result.flow_by_layer.sum(dim=1), mean)


def test_what_is_left_after_a_patch_equals_a_forward_pass_by_hand():
    # Block by block with transformers' own modules: clean positions up to block 1, then block 1.
    encoded = encoded_batch()
    model, tokens = tiny_model("llama"), encoded.tokens
    own, padding = encoded.places.mask(), Padding(2)
    flow = torch.ones(2, 2, 2)
    left = measure_left(encoded, padding, flow)
    expected = torch.zeros(2)
    for giver, taker in ((0, 1), (1, 0)):
        clean = padding.without(tokens, own[:, giver])
        with torch.no_grad():
            states = [
                model(each, output_hidden_states=True).hidden_states for each in (tokens, clean)
            ]
            mixed = torch.where(own[:, taker, :, None], states[1][1], states[0][1])
            position = model.model.rotary_emb(mixed, torch.arange(12)[None])
            out = model.model.layers[1](mixed, position_embeddings=position)
            end = model.model.norm(out[0] if isinstance(out, tuple) else out)
        change = ((end - states[1][-1]) * own[:, taker, :, None]).flatten(1).norm(dim=1)
        whole = (states[0][-1] * own[:, taker, :, None]).flatten(1).norm(dim=1)
        expected += change / whole / 2
    torch.testing.assert_close(left[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_a_direction_is_taken_out_and_all_across_it_stays():
    along, across = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([4.0, -3.0, 7.0])
    x = torch.stack([5.0 * along, across, across - 2.0 * along])
    expected = torch.stack([torch.zeros(3), across, across])
    torch.testing.assert_close(without_direction(x, along), expected)


def test_readings_have_no_part_along_the_common_direction():
    encoded = encoded_batch()
    along = torch.nn.functional.normalize(encoded.end[0, 1] - encoded.pad_end[0, 1], dim=0)
    everyone, keep = torch.arange(2), torch.ones(2, 12, dtype=torch.bool)
    whole = encoded.read(everyone, keep)
    found = replace(encoded, common=along).read(everyone, keep)
    assert float((whole @ along).abs().min()) > 1e-2
    assert float((found @ along).abs().max()) < 1e-5 * float(whole.norm(dim=-1).max())
    assert float((found - whole).norm(dim=-1).max()) < float(whole.norm(dim=-1).max())


@pytest.mark.parametrize("bos", [1, None])
def test_the_common_direction_is_what_random_tokens_add_to_a_pad(bos):
    module = tiny_model("llama")
    tokens = torch.randint(101, (5, 7), generator=torch.Generator().manual_seed(3))
    empty = torch.full((1, 7), 2)
    if bos is not None:
        tokens[:, 0] = empty[0, 0] = bos
    with torch.no_grad():
        end, pad = module.model(tokens)[0], module.model(empty)[0]
    added = sum(end[row, pos] - pad[0, pos] for row in range(5) for pos in range(1, 7))
    pads = PadEncodings(wb.wrap(module), Padding(2, bos=bos))
    found = common_direction(pads, 3, n_prompts=5, n_pos=7)
    torch.testing.assert_close(found, added / added.norm(), rtol=0, atol=1e-5)


def test_the_empty_prompt_is_encoded_once_a_length():
    model = wb.wrap(tiny_model("gpt2"))
    pads = PadEncodings(model, Padding(2))
    tokens = random_tokens(5)
    for _ in range(3):
        pads.get(tokens, torch.tensor([12, 7, 12, 7, 12]), END)
    assert pads.n_runs == 2
    alone = model.capture(torch.full((1, 7), 2), [END])[END][0]
    found = pads.get(tokens, torch.tensor([12, 7, 12, 7, 12]), END)
    assert torch.equal(found[3, :7], alone)
    assert float(found[3, 7:].abs().max()) == 0.0


def test_an_item_alone_keeps_its_place_and_the_special_tokens(tmp_path):
    model = encoder("clip", tmp_path)
    padding = Padding.of(model.tokenizer, None, model.spec.d_vocab)
    tokens = torch.tensor([model.tokenizer("the red cat")["input_ids"]])
    kept = torch.zeros(1, 5, dtype=torch.bool)
    kept[0, 3] = True
    assert padding.alone(tokens, kept)[0].tolist() == [0, 1, 1, tokens[0, 3], 1]
    assert padding.empty(0, 5).tolist() == [0, 1, 1, 1, 1]
    t5 = Padding.of(encoder("t5", tmp_path / "t5").tokenizer, None, 101)
    assert t5.empty(4, 3).tolist() == [1, 0, 0]


# Invariances


@given(order=st.permutations(range(4)))
@settings(max_examples=5, deadline=None)
def test_order_of_prompts_does_not_matter(order):
    model = wb.wrap(tiny_model("gpt2"))
    rows = random_rows()
    whole = run(model, rows)
    shuffled = run(model, [rows[index] for index in order])
    for name in ("keep_score", "flow", "flow_by_layer", "keep_set_score"):
        torch.testing.assert_close(
            getattr(shuffled, name), getattr(whole, name)[list(order)], rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_give_the_numbers_of_the_whole(batch_size):
    model = wb.wrap(tiny_model("llama"))
    options = {"knockout": True, "routes": True}
    whole = run(model, random_rows(), **options)
    parts = run(model, random_rows(), batch_size=batch_size, **options)
    for name in whole.arrays:
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), rtol=0, atol=2e-5, msg=name
        )


def test_padded_prompts_score_as_alone():
    model = wb.wrap(tiny_model("llama"))
    long, short = random_rows(2)
    short = {"tokens": short["tokens"][:7], "items": short["items"][:2]}
    options = {"knockout": True, "routes": True}
    together = run(model, [long, short], **options)
    alone = run(model, [short], **options)
    for name in ("flow", "flow_direct", "leak_score", "keep_set_score"):
        found = getattr(together, name)[1]
        wanted = getattr(alone, name)[0]
        shape = tuple(slice(0, size) for size in wanted.shape)
        torch.testing.assert_close(found[shape], wanted, rtol=0, atol=2e-5, msg=name)
    torch.testing.assert_close(together.keep_score[1, :7], alone.keep_score[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(together.flow_by_layer[1], alone.flow_by_layer[0], rtol=0, atol=2e-5)
    assert together.measured.exists()[1].tolist() == [True, True, False]
    assert float(together.flow[1, 2].abs().max()) == 0.0


def test_pads_behind_the_prompt_change_no_causal_reading_and_are_a_keep_set_of_their_own(tmp_path):
    model = encoder("clip", tmp_path)
    plain = run(model, TEXTS)
    grown = run(model, TEXTS, pad_to=20)
    width = plain.keep_score.shape[1]
    torch.testing.assert_close(grown.keep_score[:, :width], plain.keep_score, rtol=0, atol=1e-4)
    pads = grown.labels["keep_set"].index("pads")
    assert float(grown.keep_set_score[..., pads].abs().max()) == 0.0
    over_all = run(model, TEXTS, pad_to=20, readout="prompt")
    assert torch.equal(over_all.correct, grown.correct)
    assert "accuracy_before" not in over_all.metrics()
    assert float(over_all.keep_set_score[..., pads].abs().max()) > 0.0


# Backends and resumption


@pytest.mark.filterwarnings(*LIBRARY_WARNINGS)
@pytest.mark.parametrize("through", [through_bridge, through_nnsight])
def test_backends_agree(through):
    rows = random_rows(2)
    options = {"knockout": True, "routes": True, "route_threshold": 0.1}
    wanted = run(wb.wrap(tiny_model("gpt2")), rows, **options)
    found = run(through(tiny_model("gpt2", attn_implementation="eager")), rows, **options)
    for name in ("keep_score", "flow", "flow_direct", "flow_by_layer", "leak_score"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-4, msg=name
        )
    assert torch.equal(found.representative, wanted.representative)
    assert torch.equal(found.route_edges, wanted.route_edges)


def test_finished_batches_are_not_measured_again():
    done = {}

    def keep(name, compute):
        if name not in done:
            done[name] = compute()
        return done[name]

    model = wb.wrap(tiny_model("gpt2"))
    rows = random_rows()
    tokens = torch.tensor([row["tokens"] for row in rows])
    context = Context(batch_size=2, rows=tuple(rows), keep=keep)
    whole = measure_information_flow(model, tokens, InformationFlowConfig(), context)
    assert sorted(done) == ["batch-0", "batch-2", "common"]
    del done["batch-2"]
    again = measure_information_flow(model, tokens, InformationFlowConfig(), context)
    assert torch.equal(again.flow, whole.flow)


def test_prototypes_are_those_of_the_item_alone():
    encoded = encoded_batch()
    alone = encode_alone(encoded, Padding(2))
    tokens = torch.full((1, 12), 2)
    tokens[0, 1:3] = encoded.tokens[1, 1:3]
    end = encoded.model.capture(tokens, [END])[END] - encoded.pad_end[1:]
    torch.testing.assert_close(alone.read[1, 0], end[0, 1:3].sum(dim=0), rtol=1e-4, atol=1e-4)
