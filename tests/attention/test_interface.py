"""The hook point of attention: whom it serves, and when no more."""

import pytest
import torch

from tests.zoo import random_tokens, tiny_model
from workbench.attention.interface import AttentionSession, implementation_name
from workbench.errors import EngineError
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
