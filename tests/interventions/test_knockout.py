"""Attention knockout against rows worked by hand and an independent eager pass."""

from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.attention.test_streaming import make_inputs, reference
from tests.interventions.test_running_columns import SPEC as MADE
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.zoo import padded, random_tokens, tiny_model
from workbench.attention.edits import AttentionCall
from workbench.attention.statistics import ColumnMean
from workbench.errors import ConfigError
from workbench.interventions.knockout import KnockOut, _without
from workbench.models.base import Site

EDGES = [(5, 2), (5, 3), (9, 0), (11, 11)]


def test_a_row_is_renormalised_by_hand():
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[None, None]
    hidden = torch.zeros(1, 3, 3, dtype=torch.bool)
    hidden[0, 2, 1] = hidden[0, 1, 0] = hidden[0, 0, 0] = True
    found = _without(pattern, hidden, [0])[0, 0]
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2 / 0.7, 0.0, 0.5 / 0.7]])
    torch.testing.assert_close(found, expected)


def test_a_learned_sink_takes_its_share_of_what_is_freed():
    # The row sums to 0.8, the sink has 0.2; without the key of 0.3 the rest is 0.7.
    pattern = torch.tensor([[[[0.3, 0.5]]]])
    hidden = torch.tensor([[[True, False]]])
    torch.testing.assert_close(_without(pattern, hidden, [0]), torch.tensor([[[[0.0, 0.5 / 0.7]]]]))


def test_rows_without_a_hidden_key_keep_their_bits_though_they_sum_to_less_than_1():
    row = [0.25, 0.5, 0.25 - 2.0**-24]
    pattern, hidden = torch.tensor([[[row, row]]]), torch.zeros(1, 2, 3, dtype=torch.bool)
    hidden[0, 1, 0] = True
    assert _without(pattern, hidden, [0])[0, 0, 0].tolist() == row


def test_behind_a_window_rows_and_keys_are_blocked_by_their_positions():
    inputs = make_inputs(n_q=3, n_k=5)  # keys 4 ... 8, queries 6 ... 8
    (edit,) = KnockOut.edges([(7, 5), (8, 4), (8, 8), (4, 0), (2, 1)], 9).plan(
        replace(MADE, n_heads=4)
    )
    _, z, log_sum = reference(inputs)
    found = edit.output(AttentionCall(0, inputs, log_sum.float(), None, 4), z.float())
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[2:]
    visible[1, 1] = visible[2, 0] = visible[2, 4] = False
    expected = reference(replace(inputs, causal=False, mask=visible[None, None]))[1]
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    assert (found - z).abs().amax(dim=(0, 2, 3))[1:].min() > 0.01


def eager_logits(family, tokens, edges, heads=None, mask=None):
    """A forward pass of transformers' eager model whose scores are -inf at the edges."""
    model = tiny_model(family, attn_implementation="eager")
    softmax = torch.nn.functional.softmax
    layer = 0

    def blocked(scores, dim=-1, **options):
        nonlocal layer
        if scores.dim() == 4 and scores.shape[-1] == scores.shape[-2] == tokens.shape[1]:
            scores = scores.clone()
            rows = range(scores.shape[1])
            for head in [h for h in rows if heads is None or (layer, h) in heads]:
                for query, key in edges:
                    scores[:, head, query, key] = -torch.inf
            layer += 1
        return softmax(scores, dim=dim, **options)

    torch.nn.functional.softmax = blocked
    try:
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits
    finally:
        torch.nn.functional.softmax = softmax
    assert layer == 2
    return logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("heads", [None, ((0, 1), (1, 3))], ids=["all heads", "two heads"])
def test_logits_equal_those_of_scores_set_to_minus_infinity(family, heads):
    tokens = random_tokens(2)
    edges = EDGES[:3]
    model = wb.wrap(tiny_model(family))
    with model.edit(KnockOut.edges(edges, 12, heads)):
        found = model.logits(tokens)
    expected = eager_logits(family, tokens, edges, heads)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(found, model.logits(tokens), atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "gpt_oss"])
def test_reading_the_pattern_does_not_change_the_edit(family):
    # With a statistic the pattern form acts tile by tile; without, the rows are computed anew.
    eager = {"attn_implementation": "eager"} if family in ("gemma2", "gpt_oss") else {}
    model = wb.wrap(tiny_model(family, **eager))
    tokens, mask = padded(random_tokens(3), [12, 7, 10], "right")
    end = Site("ln_final")
    with model.edit(KnockOut.edges(EDGES, 12)):
        alone = model.capture(tokens, [end], attention_mask=mask)[end]
        both = model.capture(tokens, [end, Site("pattern", 0)], attention_mask=mask)
        read = model.capture(tokens, [Site("pattern", 1)], {"pattern": ColumnMean()}, mask)
    torch.testing.assert_close(both[end][mask.bool()], alone[mask.bool()], rtol=0, atol=2e-4)
    pattern = both[Site("pattern", 0)]
    assert all(float(pattern[:, :, query, key].abs().max()) == 0.0 for query, key in EDGES)
    assert read[Site("pattern", 1)].shape == (3, 4, 12)


def test_long_prompts_are_edited_in_the_right_tiles(monkeypatch):
    from workbench.attention import streaming

    monkeypatch.setattr(streaming, "TILE_ROWS", 4)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", 4)
    monkeypatch.setattr(streaming, "TILE_FLOATS", 1)
    model = wb.wrap(tiny_model("llama"))
    tokens = random_tokens(3)
    blocked = torch.zeros(3, 12, 12, dtype=torch.bool)
    blocked[0, 9, 2] = blocked[2, 5, 1] = True
    with model.edit(KnockOut(blocked)):
        pattern = model.capture(tokens, ["L1.pattern"])["L1.pattern"]
        logits = model.logits(tokens)
    hidden = pattern.amax(dim=1) == 0
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    assert torch.equal(hidden & causal, blocked)
    for row, edges in ((0, [(9, 2)]), (1, []), (2, [(5, 1)])):
        expected = eager_logits("llama", tokens[row : row + 1], edges)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=2e-4)


def test_a_query_without_keys_gets_nothing():
    model = wb.wrap(tiny_model("gpt2"))
    with model.edit(KnockOut.edges([(0, 0)], 12, ((0, 2),))):
        z = model.capture(random_tokens(1), ["L0.z"])["L0.z"]
    assert float(z[0, 0, 2].abs().max()) == 0.0
    assert float(z[0, 0, 1].abs().max()) > 0.0


@pytest.mark.filterwarnings(*LIBRARY_WARNINGS)
@pytest.mark.parametrize("through", [through_bridge, through_nnsight])
def test_other_backends_agree(through):
    tokens = random_tokens(2)
    edit = KnockOut.edges(EDGES, 12)
    model = wb.wrap(tiny_model("gpt2"))
    other = through(tiny_model("gpt2", attn_implementation="eager"))
    with model.edit(edit), other.edit(edit):
        torch.testing.assert_close(other.logits(tokens), model.logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_pos", [10, 12, 20], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("bias", ["none", "key-value", "sink-token"])
def test_toys_agree_with_their_own_scores(bias, n_pos):
    from toy_tasks.model import ToyModelConfig, make_model

    config = ToyModelConfig(n_layers=1, n_heads=2, d_model=16, d_vocab=101, n_ctx=16, bias=bias)
    toy = make_model(config, 0).eval()
    tokens = random_tokens(1)
    plain = wb.wrap(toy)
    before = plain.capture(tokens, ["L0.pattern"])["L0.pattern"]
    edges = [edge for edge in EDGES if max(edge) < n_pos]
    with plain.edit(KnockOut.edges(edges, n_pos)):
        after = plain.capture(tokens, ["L0.pattern"])["L0.pattern"]
    kept = torch.ones(12, 12)
    for query, key in edges:
        kept[query, key] = 0.0
    sink = 1.0 - before.sum(-1, keepdim=True)
    expected = before * kept
    expected = expected / (expected.sum(-1, keepdim=True) + sink)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


def test_nothing_blocked_is_the_stock_model_and_bad_edges_are_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with model.edit(KnockOut(torch.zeros(1, 12, 12, dtype=torch.bool))):
        assert torch.equal(
            model.logits(random_tokens(1)), tiny_model("gpt2")(random_tokens(1)).logits
        )
    for edge in ((3, 12), (12, 3), (-1, 0), (3, -1)):
        with pytest.raises(ConfigError, match=rf"0 ... 11; got \({edge[0]}, {edge[1]}\)"):
            KnockOut.edges([(3, 1), edge], 12)
    assert KnockOut.edges([(11, 0), (0, 11)], 12).blocked.nonzero().tolist() == [
        [0, 0, 11],
        [0, 11, 0],
    ]
    with (
        pytest.raises(ConfigError, match="heads must lie"),
        model.edit(KnockOut.edges([(3, 1)], 12, ((7, 0),))),
    ):
        pass


def test_generation_sees_the_keys_that_only_the_prompt_must_not():
    model = wb.wrap(tiny_model("gpt2"))
    prompt = random_tokens(1)
    with model.edit(KnockOut.edges([(11, 2)], 12)):
        found = model.generate(prompt, max_new_tokens=3, do_sample=False)
        step = [model.logits(found[:, :n])[0, -1].argmax().item() for n in (12, 13, 14)]
    assert found[0, 12:].tolist() == step


def test_rows_without_a_blocked_key_stay_bit_for_bit():
    model = wb.wrap(tiny_model("llama"))
    tokens, blocked = random_tokens(2), torch.zeros(2, 12, 12, dtype=torch.bool)
    blocked[0, 5, 2] = True
    with model.edit(KnockOut.edges([(0, 11)], 12)):  # what is not seen anyway
        plain = model.capture(tokens, ["L0.z"])["L0.z"]
    with model.edit(KnockOut(blocked)):
        found = model.capture(tokens, ["L0.z"])["L0.z"]
    rows = torch.arange(12) != 5
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[0, rows], plain[0, rows])
    assert not torch.allclose(found[0, 5], plain[0, 5], atol=1e-4)


def decoded_steps(model, edits, tokens, n_new, **options):
    """The text that is decoded under some edits, and every step's logits."""
    steps = []
    hook = model.model.register_forward_hook(
        lambda module, args, found: steps.append(found.logits[:, -1])
    )
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": n_new, **options}
    with hook, model.edit(*edits):
        text = model.generate(tokens, **options)
    return text, torch.stack(steps, dim=1)


TWO = [KnockOut.edges([(3, 1), (4, 2)], 8), KnockOut.edges([(0, 3), (5, 0), (7, 7)], 8)]
"""Rows with the numbers that a decoded one has behind a window of 5 (4) and in its call (0)."""


@pytest.mark.parametrize("edits", [TWO[:1], TWO], ids=["after the kernel", "in tiles"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
def test_decoded_tokens_see_every_key_that_is_left(family, edits):
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model, tokens = wb.wrap(tiny_model(family, **eager)), random_tokens(2, 8)
    text, steps = decoded_steps(model, edits, tokens, 7)
    blocked = torch.cat([edit.blocked for edit in edits]).any(dim=0).nonzero().tolist()
    whole = eager_logits(family, text, blocked)[:, 7:-1]
    torch.testing.assert_close(steps, whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("edits", [[], TWO[:1]], ids=["after the kernel", "in tiles"])
def test_several_samples_have_the_pattern_of_their_prompt(edits):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, 8)
    blocked = torch.zeros(2, 8, 8, dtype=torch.bool)
    blocked[0, 7, 2] = blocked[1, 5, 1] = True
    options = {"do_sample": True, "num_return_sequences": 2}
    text, steps = decoded_steps(model, [KnockOut(blocked), *edits], tokens, 3, **options)
    for row, edge in enumerate([(7, 2), (7, 2), (5, 1), (5, 1)]):
        edges = [edge, *([(3, 1), (4, 2)] if edits else [])]
        whole = eager_logits("llama", text[row : row + 1], edges)[0, 7:-1]
        torch.testing.assert_close(steps[row], whole, rtol=0, atol=2e-4)
    with model.edit(KnockOut(blocked)), pytest.raises(ConfigError, match="2 for a batch of 3"):
        model.logits(random_tokens(3, 8))


def test_positions_that_the_tensor_does_not_have_are_not_blocked():
    edit = KnockOut(torch.ones(1, 3, 4, dtype=torch.bool))
    found = edit._among(torch.arange(-2, 6), torch.arange(-2, 7), 1)
    expected = torch.zeros(1, 8, 9, dtype=torch.bool)
    expected[:, 2:5, 2:6] = True
    assert torch.equal(found, expected)
