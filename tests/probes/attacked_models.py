"""Small models under attack, shared by the tests of activation attacks."""

import torch

import workbench as wb
from probes.activation_attacks import ActivationAttackConfig
from probes.activation_attacks_bench import make_bench
from probes.activation_attacks_cases import (
    draw_cases,
)
from probes.activation_attacks_optimise import Descent
from probes.activation_attacks_solve import Report, solve
from tests.zoo import tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.models.toy import ToyAdapter

NO_DATA = torch.zeros(0, 0, dtype=torch.long)
SMALL = {"n_attacked": (1, 2), "context": 8, "n_seeds": 2, "steps": 25, "t_limit": 6}


def small(**changes):
    return ActivationAttackConfig(**{**SMALL, "token_attack": False, **changes})


def toy():
    config = ToyModelConfig(d_vocab=37, n_layers=2, n_heads=2, d_model=16, n_ctx=32)
    return ToyAdapter(make_model(config, 0))


MODELS = {
    "gpt2": lambda: wb.wrap(tiny_model("gpt2")),
    "gemma2": lambda: wb.wrap(tiny_model("gemma2")),
    "mamba": lambda: wb.wrap(tiny_model("mamba")),
    "toy": toy,
}
"""Learned positions; rotary with windows; no attention, so no prefix; no cache."""


def bench_of(model, n_rows=3, n_context=8, n_target=5, layer=0, free=None):
    config = small(n_seeds=n_rows, context=n_context, t_limit=n_target)
    cases = draw_cases(model, NO_DATA, config, Context())
    free = torch.ones(model.spec.d_model) if free is None else free
    return make_bench(model, layer, cases, {1.0: free})


def solved(bench, problems, descent=None):
    found = {}
    solve(bench, problems, descent or Descent(steps=40), Report(found.__setitem__))
    return [found[problem] for problem in problems]
