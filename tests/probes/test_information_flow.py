"""Information flow: planted toys, causal zeros, identities, encoders, backends and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from probes.information_flow import InformationFlowConfig, measure_information_flow
from probes.information_flow_cross import encode_alone, measure_left, pair_mask
from probes.information_flow_encoding import END, Encoded, PadEncodings
from probes.information_flow_items import Padding, Places
from tests.encoders import save_encoder
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.probes.planted_flow import copying_toy, rows_of
from tests.zoo import random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError

PLAIN = {"common": "left-in"}
TWO_ITEMS = rows_of(([1, 5, 2, 6, 3], [[5], [6]]), ([1, 7, 2, 8, 3], [[7], [8]]))
TEXTS = [
    {"text": "the red cat by a pool table", "items": ["red cat", "pool table"]},
    {"text": "a starfish near the big blue house", "items": ["starfish", "blue house"]},
    {"text": "a sunflower and a football on the boat", "items": ["sunflower", "football", "boat"]},
]


def random_rows(n_prompts=4, seed=0):
    """Prompts of 12 tokens for the zoo's models, with items of 2, 1 and 3 tokens."""
    tokens = random_tokens(n_prompts, seed=seed).tolist()
    return rows_of(*((row, [row[1:3], row[5:6], row[8:11]]) for row in tokens))


def run(model, rows, **options):
    return wb.run("information-flow", model, rows, **options)


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


def encoder(kind, folder):
    return wb.load(str(save_encoder(kind, folder)))


def test_items_flow_both_ways_in_t5_and_forward_only_in_clip(tmp_path):
    both = run(encoder("t5", tmp_path / "t5"), TEXTS)
    pairs = pair_mask(both.measured.exists())
    assert float(both.flow[pairs].min()) > 1e-4
    causal = run(encoder("clip", tmp_path / "clip"), TEXTS, knockout=True)
    earlier = pairs & torch.ones(3, 3).triu(1).bool()
    assert float(causal.flow[earlier].max()) == 0.0
    assert float(causal.flow_direct[earlier].max()) == 0.0
    assert float(causal.flow[pairs & ~earlier].min()) > 1e-4


# Identities


def encoded_batch(layer=1):
    model = wb.wrap(tiny_model("llama"))
    tokens = random_tokens(2)
    of_pos = torch.full((2, 12), -1)
    of_pos[:, 1:3], of_pos[:, 6] = 0, 1
    pads = PadEncodings(model, Padding(2))
    lengths = torch.tensor([12, 12])
    site = f"L{layer}.resid_pre"
    pad_layer = model.capture(torch.full((2, 12), 2), [site])[site]
    end = model.capture(tokens, [END])[END]
    places = Places(of_pos, 2)
    pad_end = pads.get(tokens, lengths, END)
    return Encoded(model, layer, tokens, None, places, pad_layer, pad_end, end, None, False, 2)


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


# Refusals


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"tokens": [1, 5, 2], "items": []}], "at least one"),
        ([{"tokens": [1, 5, 2]}], "must have items"),
        ([{"tokens": [1, 5, 2], "items": [[9]]}], r"no \[9\] after position 0"),
        ([{"tokens": [1, 5, 2], "items": [[2], [5]]}], r"no \[5\] after position 3"),
        ([{"tokens": [1, 5, 2], "items": [[5], "x"]}], "all texts or all lists"),
        ([{"tokens": [1, 5, 2], "items": ["x"]}], "fast"),
        ([[1, 5, 2]], "builtin:items"),
    ],
    ids=["empty", "none", "absent", "order", "mixed", "text", "no rows"],
)
def test_items_that_cannot_be_found_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        run(copying_toy({}), rows)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["red dog"], "no 'red dog'"),
        (["cat", "red"], "no 'red' in ' by"),
        (["cat", " "], "no ' '"),
        (["sta", "tarfish"], "in order"),
        (["pool t", "able"], "share a token"),
    ],
)
def test_items_that_are_not_in_the_text_are_refused(items, message, tmp_path):
    row = {"text": "the red cat by a pool table and starfish", "items": items}
    with pytest.raises(DataError, match=message):
        run(encoder("t5", tmp_path), [row])


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path):
    toy = copying_toy({})
    with pytest.raises(ConfigError, match="layer must be at most 2"):
        run(toy, TWO_ITEMS, layer=3)
    with pytest.raises(ConfigError, match="pad_to must lie between 5"):
        run(toy, TWO_ITEMS, pad_to=4)
    with pytest.raises(DataError, match="pad must be"):
        run(toy, TWO_ITEMS, pad=99)
    with pytest.raises(ConfigError, match="at least 2"):
        InformationFlowConfig(classifier_folds=1)
    with pytest.raises(CapabilityError, match="attention"):
        run(wb.wrap(tiny_model("mamba")), random_rows(), knockout=True)


def test_the_classifier_says_how_many_prompts_it_needs_and_what_it_found():
    model = wb.wrap(tiny_model("llama"))
    with pytest.raises(DataError, match="classifier_folds=5 needs at least as many prompts; got 4"):
        run(model, random_rows(), classifier_folds=5)
    with pytest.raises(DataError, match="items of several tokens"):
        run(copying_toy({}), TWO_ITEMS, classifier_folds=2)
    result = run(model, random_rows(12), classifier_folds=3)
    several = result.measured.item_mask()[:, [0, 2]].any(dim=1)
    assert not bool((result.predicted_redundant & ~several).any())
    found = result.metrics()
    truth, said = ~result.representative[several], result.predicted_redundant[several]
    assert found["classifier_accuracy"] == pytest.approx((truth == said).double().mean().item())
    assert found["classifier_base_rate"] == pytest.approx(found["redundant_rate"])


def test_an_item_behind_the_cut_is_refused(tmp_path):
    with pytest.raises(DataError, match="behind the 4"):
        run(encoder("t5", tmp_path), TEXTS[:1], n_pos=4)


def test_single_items_have_no_leakage_to_speak_of():
    rows = rows_of(([1, 5, 2], [[5]]))
    found = run(copying_toy({}), rows, **PLAIN).metrics()
    assert "leakage_rate" not in found
    assert found["representative_rate"] == 1.0


def test_prototypes_are_those_of_the_item_alone():
    encoded = encoded_batch()
    alone = encode_alone(encoded, Padding(2))
    tokens = torch.full((1, 12), 2)
    tokens[0, 1:3] = encoded.tokens[1, 1:3]
    end = encoded.model.capture(tokens, [END])[END] - encoded.pad_end[1:]
    torch.testing.assert_close(alone.read[1, 0], end[0, 1:3].sum(dim=0), rtol=1e-4, atol=1e-4)
