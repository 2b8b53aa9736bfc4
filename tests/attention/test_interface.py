"""The hook point of attention: whom it serves, and when no more."""

import pytest
import torch

from tests.zoo import random_tokens, tiny_model
from workbench.attention.edits import AttentionEdit
from workbench.attention.interface import (
    AttentionSession,
    _columns_of,
    _is_causal,
    _with_position_bias,
    implementation_name,
    stock_attention,
)
from workbench.attention.streaming import PatternAccumulator, PatternStatistic
from workbench.errors import CapabilityError, EngineError
from workbench.models.base import Site


def hooked(layers):
    """A model that runs through the hook point, and a session that reads z of some layers."""
    model = tiny_model("llama")
    stock = model(random_tokens()).logits
    model.set_attn_implementation(implementation_name("sdpa"))
    modules = {model.model.layers[layer].self_attn: layer for layer in layers}
    return model, stock, AttentionSession("sdpa", modules, {n: {"z": None} for n in layers}, {})


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_that_has_ended_serves_its_modules_no_more(fails):
    model, stock, session = hooked([0, 1])
    with torch.no_grad():
        with session:
            assert torch.equal(model(random_tokens()).logits, stock)
            assert set(session.captured) == {Site("z", 0), Site("z", 1)}
        if fails:
            with pytest.raises(IndexError), session:
                model(torch.full((1, 4), 1000))  # no such token
        session.captured.clear()
        with pytest.raises(EngineError, match="active session"):
            model(random_tokens())
    assert not session.captured


def test_a_module_without_a_session_is_refused_and_a_layer_without_a_call_named():
    model, _, session = hooked([0])
    with torch.no_grad(), session, pytest.raises(EngineError, match="active session"):
        model(random_tokens())
    session.check_calls()
    unused = AttentionSession("sdpa", dict.fromkeys(model.model.layers, 1), {}, {})
    with pytest.raises(EngineError, match=r"layers \[1, 1\]"):
        unused.check_calls()


def one_layer(*edits, **options):
    """A session of one layer, and q, k, v of two prompts with ten keys."""
    module = tiny_model("llama").model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 10, 8, generator=generator) for n in (4, 2, 2))
    reads = {0: {"pattern": None, "k": None}}
    session = AttentionSession("sdpa", {module: 0}, reads, {0: list(edits)}, **options)
    return session, module, (q, k, v)


@pytest.mark.parametrize(
    "special", [{"softcap": 5.0}, {"s_aux": torch.zeros(4)}], ids=["cap", "sinks"]
)
def test_sdpa_is_refused_with_either_of_what_it_would_drop(special):
    session, module, (q, k, v) = one_layer()
    with pytest.raises(CapabilityError, match="capped scores or learned sinks"):
        session.attend(module, q, k, v, None, 0.4, special)


def test_of_a_static_cache_what_has_come_is_read_call_by_call():
    session, module, (q, k, v) = one_layer()
    visible = torch.ones(10, 10, dtype=torch.bool).tril()
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, 10)):
        mask = visible[None, None, start:stop].expand(2, 1, -1, -1)
        session.attend(module, q[:, :, start:stop], k, v, mask, 0.4, {})
        pattern, keys = session.captured[Site("pattern", 0)], session.captured[Site("k", 0)]
        assert torch.equal(keys, k[:, :, :stop].transpose(1, 2))
        scores = 0.4 * q[:, :, start:stop] @ k[:, :, :stop].repeat_interleave(2, 1).mT
        scores = scores.masked_fill(~visible[start:stop, :stop], -torch.inf)
        torch.testing.assert_close(pattern, scores.softmax(-1), rtol=0, atol=1e-6)


def test_an_edit_of_tiles_is_told_where_every_call_stands():
    told = []

    def begin(call):
        told.append(
            (call.n_before, call.first_column, *call.first_key.tolist(), *call.n_tokens.tolist())
        )
        return lambda block: block.pattern

    valid = torch.ones(2, 6)
    valid[1, :2] = 0
    places = {"row_valid": valid, "first_key": torch.tensor([0, 2])}
    edit = AttentionEdit(0, None, None, begin=begin)
    session, module, (q, k, v) = one_layer(edit, **places)
    # The prompt, a token behind it, one behind a window that has let four keys go, all without a cache.
    for start, stop, gone in ((0, 6, 0), (6, 7, 0), (7, 8, 4), (0, 9, 0)):
        seen = k[:, :, gone:stop], v[:, :, gone:stop]
        session.attend(module, q[:, :, start:stop], *seen, None, 0.4, {})
    expected = [(0, 0, 0, 2, 6, 4), (6, 0, 0, 2, 7, 5), (7, 4, -4, -2, 8, 6), (0, 0, 0, 2, 9, 7)]
    assert told == expected


class Places(PatternAccumulator, PatternStatistic):
    """Notes on which device the rows of a layer are, beside its pattern."""

    def __init__(self):
        self.seen = []

    def start(self, shape):
        self.seen.append((shape.row_valid.device.type, shape.device.type))
        return self

    def update(self, block):
        self.seen.append((block.row_valid.device.type, block.pattern.device.type))

    def finish(self):
        return torch.zeros(())


def test_rows_of_padding_come_to_the_device_of_their_layer():
    """The mask of the prompts is where the model begins; its other layers may be on other devices."""
    places, valid = Places(), torch.ones(2, 10)
    session, module, projected = one_layer(row_valid=valid)
    session.reads = {0: {"pattern": places}}
    session.attend(module, *(x.to("meta") for x in projected), None, 0.4, {})
    assert len(places.seen) > 1
    assert set(places.seen) == {("meta", "meta")}


@pytest.mark.parametrize(
    ("first", "batch", "dropped", "expected"),
    [
        (None, 2, 3, [-3, -3]),
        (torch.tensor([0, 4]), 2, 0, [0, 4]),
        (torch.tensor([0, 4]), 2, 5, [-5, -1]),
        (torch.tensor([0, 4]), 6, 1, [-1, -1, -1, 3, 3, 3]),  # three samples of each
    ],
)
def test_the_first_key_s_column_follows_samples_and_the_window(first, batch, dropped, expected):
    assert _columns_of(first, batch, dropped, torch.device("cpu")).tolist() == expected


def test_a_position_bias_is_added_where_the_mask_lets_see():
    bias = torch.tensor([[[[1.0, 2.0]]]])
    assert _with_position_bias(None, None) is None
    assert _with_position_bias(None, bias) is bias
    mask = torch.tensor([[[[True, False]]]])
    assert _with_position_bias(mask, None) is mask
    assert _with_position_bias(mask, bias).tolist() == [[[[1.0, -torch.inf]]]]
    assert _with_position_bias(torch.tensor([[[[0.5, -3.0]]]]), bias).tolist() == [[[[1.5, -1.0]]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_other_precisions_reading_a_pattern_leaves_the_output_to_the_stock_kernel(dtype):
    session, module, inputs = one_layer()
    q, k, v = (each.to(dtype) for each in inputs)
    found = session.attend(module, q, k, v, None, 0.4, {})
    assert torch.equal(
        found, stock_attention("sdpa", module)(module, q, k, v, None, scaling=0.4)[0]
    )


@pytest.mark.parametrize(
    ("of_module", "said", "expected"),
    [(None, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_attention_is_causal_unless_the_call_or_else_the_module_says_no(of_module, said, expected):
    module = torch.nn.Module()
    if of_module is not None:
        module.is_causal = of_module
    assert _is_causal(module, said) is expected


def test_a_model_of_one_layer_begins_a_pass_with_every_call():
    """What a pass shares is let go: masks of earlier passes would be kept for ever."""
    session, module, (q, k, v) = one_layer()
    held = []
    for _ in range(2):
        session.attend(module, q, k, v, None, 0.35, {})
        held.append(session._shared)
    assert held[0] is not held[1]
