"""One small result of every probe, mode and toy task, and all that can be drawn of them.

Texts, domains and models are named so that markup in them would show.
"""

import dataclasses
from functools import cache

import numpy as np
import torch

import workbench as wb
from probes.figures.activation_attacks import figure_chi
from probes.figures.active_dormant import figures_over_revisions
from probes.figures.token_dynamics_simulation import figure_trajectory
from probes.state_space_dynamics import log_times, one_dimensional, simulate
from probes.token_dynamics import TokenDynamicsConfig, measure_token_dynamics
from tests.probes.figures import test_activation_attacks, test_active_dormant, test_reachability
from tests.probes.figures.planted import planted_result
from tests.zoo import tiny_model
from workbench.discovery import find_figures, find_probe

EVIL = '<a href="https://example.com">x</a>'
TEXTS = [f"{EVIL} one two three four five six", f"seven eight nine ten {EVIL} eleven"]
ITEMS = [
    {"text": "a red cube and a blue ball", "items": ["red cube", "blue ball"]},
    {"text": f"a tall <b>tree and a small {EVIL}", "items": ["tall <b>tree", f"small {EVIL}"]},
]
NO_DATA = torch.zeros(0, 0, dtype=torch.long)


@cache
def demo():
    return wb.load("demo")


def measured(probe, data, **settings):
    return wb.run(probe, demo(), data, **settings).measured


def dormant():
    planted = test_active_dormant.planted_result()
    texts = {"domain": (EVIL, "code"), "example_token": (EVIL,) * 8}
    return dataclasses.replace(planted, labels=planted.labels | texts)


def spectrum():
    config = TokenDynamicsConfig(mode="state-space")
    return measure_token_dynamics(wb.wrap(tiny_model("mamba")), NO_DATA, config)


def reached():
    n = 3
    numbers = {
        "head_limit": torch.rand(n, 2),
        "head_orthogonal": torch.rand(n, 2) / 2,
        "head_min_k": torch.ones(n, 2, dtype=torch.long),
        "bound_excluded": torch.tensor([False, False, True]),
    }
    labels = {f"{name}_text": (EVIL,) * n for name in ("state", "target", "prompt")}
    return test_reachability.result_of([0, 2, -1], labels=labels, **numbers)


RESULTS = {
    "attention-sinks": lambda folder: planted_result(),
    "attention-sinks swapped": lambda folder: planted_result(position=3, inputs="swap"),
    "attention-sinks long": lambda folder: planted_result(lengths=(300, 20)),
    "active-dormant": lambda folder: dormant(),
    "successor-heads": lambda folder: measured("successor-heads", TEXTS, sae_steps=10, sae_seeds=2),
    "information-flow": lambda folder: measured(
        "information-flow", ITEMS, knockout=True, routes=True
    ),
    "token-dynamics": lambda folder: measured("token-dynamics", TEXTS, new_tokens=2),
    "token-dynamics state-space": lambda folder: spectrum(),
    "activation-attacks": lambda folder: test_activation_attacks.planted_result(),
    "reachability": lambda folder: reached(),
    "bigram-backcopy": lambda folder: trained("bigram-backcopy", folder, steps=4, n_pos=16),
    "scan-snap": lambda folder: trained("scan-snap", folder, steps=20),
    "scan-snap-sweep": lambda folder: trained(
        "scan-snap-sweep",
        folder,
        lr_z=(1.0, 4.0),
        lr_ratio=(1.0, 2.0),
        n_queries=(1, 2),
        n_seeds=2,
        steps=2,
    ),
    "scan-snap-text": lambda folder: trained("scan-snap-text", folder, steps=4, n_layers=2),
    "state-space": lambda folder: trained("state-space", folder, steps=2, record_every=1),
}
"""By the probe's name and what is special about the result."""


def trained(name, folder, **settings):
    toy = find_probe(name)
    return toy.measure(toy.config(**settings), folder / name)


def figures_of(case, folder):
    """Every figure of one result, by name."""
    return find_figures(find_probe(case.split()[0]))(RESULTS[case](folder))


def figures_of_several(folder):
    """Figures that take several results, or none."""
    attacked = RESULTS["activation-attacks"](folder)
    one, time = torch.ones(1), log_times(10.0, 5)
    trajectory = simulate(one_dimensional(-one, one, one), torch.ones(1, 2, 1).double(), time)
    return {
        "chi": figure_chi({EVIL: attacked, "other": attacked}),
        "trajectory": figure_trajectory(trajectory, limits={"closed form": np.ones(len(time))}),
        **figures_over_revisions([dormant(), dormant()], ["step1", "step8"]),
        "by_name": figures_over_revisions([dormant(), dormant()], [EVIL, "end"])["emergence"],
    }
