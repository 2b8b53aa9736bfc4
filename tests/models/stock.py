"""Plain transformers, as the tests of the hf backend compare with."""

import torch

from tests.zoo import tiny_model

LEARNED_SINKS = "gpt_oss"
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def stock_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def eager_run(family, tokens):
    """Attentions and hidden states of the same weights through plain eager transformers."""
    model = tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens, use_cache=False, output_attentions=True, output_hidden_states=True)
