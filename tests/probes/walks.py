"""How the tests of the walk measure and compare."""

import torch

from probes.token_dynamics import TokenDynamicsConfig, measure_token_dynamics
from tests.zoo import tiny_model
from workbench.context import Context

QUIET = TokenDynamicsConfig(new_tokens=0)


def walk(model, tokens, config=QUIET, **context):
    return measure_token_dynamics(model, tokens, config, Context(**context))


def silent_gpt2(**changes):
    """A GPT-2 whose blocks write nothing."""
    model = tiny_model("gpt2", **changes)
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


def everything(result):
    return {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}


BATCH_SECOND = ("straightness_by_view", "view_cosine", "view_turning")


def rows_of(result, rows):
    return {
        name: value[:, rows] if name in BATCH_SECOND else value[rows]
        for name, value in everything(result).items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=2e-5, equal_nan=True, msg=name
        )


CONFIG = TokenDynamicsConfig(new_tokens=3, queries=(-1, 4))
