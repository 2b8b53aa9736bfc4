"""Searches that count their work and kill their own process (SIGKILL) at a given amount of it.

python -m tests.probes.killed_searches activations FOLDER 400
"""

import os
import signal
import sys
from pathlib import Path

import torch

from probes.activation_attacks import ActivationAttackConfig, measure_activation_attacks
from probes.reachability import ReachabilityConfig, measure_reachability
from tests.probes.attacked_models import NO_DATA, toy
from tests.probes.bag_model import bag
from workbench.context import Context
from workbench.store.pieces import Pieces

KEY = "d" * 64
ATTACK = ActivationAttackConfig(
    n_attacked=(1, 2),
    steps=40,
    n_seeds=4,
    context=8,
    t_limit=12,
    positions="last",
    token_attack=False,
)
CONTROL = ReachabilityConfig(k_max=3, method="gradient", iterations=9, batch=6, candidates=4)
STATES = [(0, 1, 2), (3, 3, 1), (5, 4, 6)]
TOGETHER = 30
"""Rows of a pass: five problems with six proposals each."""
ONE_PROBLEM = {
    "activations": ATTACK.steps + 1,
    "controls": (CONTROL.iterations + 1) * CONTROL.batch + TOGETHER // CONTROL.batch,
}
"""Work of one problem: passes forward and backward; rows that are scored (the first step has one)."""


class Counter:
    """Counts work, the most in one pass, and ends the process at too much of it."""

    def __init__(self, most):
        self.done, self.widest, self.most = 0, 0, most

    def add(self, n):
        self.done, self.widest = self.done + n, max(self.widest, n)
        if self.done >= self.most:
            os.kill(os.getpid(), signal.SIGKILL)


def context(folder):
    if folder is None:
        return {}
    pieces = Pieces(folder, KEY)
    return {"keep": pieces.get_or_compute, "drafts": pieces}


def attack(folder, most):
    model, counter = toy(), Counter(most)
    run = model.continue_from

    def counted(layer, resid, **options):
        if resid.requires_grad:
            counter.add(len(resid))
        return run(layer, resid, **options)

    model.continue_from = counted
    found = measure_activation_attacks(model, NO_DATA, ATTACK, Context(**context(folder)))
    return found.accuracy, counter


def control(folder, most):
    model, counter = bag(12, 3), Counter(most)
    run = model.logits

    def counted(tokens, *rest, **options):
        if len(tokens) > 1:
            counter.add(len(tokens))
        return run(tokens, *rest, **options)

    model.logits = counted
    rows = [{"state": list(s), "target": t} for s in STATES for t in range(12)]
    tokens = torch.tensor([row["state"] for row in rows])
    about = Context(rows=tuple(rows), batch_size=TOGETHER, **context(folder))
    return measure_reachability(model, tokens, CONTROL, about).prompts, counter


SEARCHES = {"activations": attack, "controls": control}

if __name__ == "__main__":
    SEARCHES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
