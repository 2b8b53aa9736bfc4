"""Peak memory of searches under budgets, in a process of its own; writes JSON.

Counted is the resident set beyond what the process had after a small search of the same kind: the model,
the libraries and what they set up at first use are there already, free memory is given back before.
"""

import ctypes
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import workbench as wb
from probes.activation_attacks_bench import Cell, Problem, make_bench, problems_at_once
from probes.activation_attacks_cases import Cases
from probes.activation_attacks_optimise import Descent
from probes.activation_attacks_solve import Report, solve
from probes.reachability_problems import Problem as Pair
from probes.reachability_problems import State
from probes.reachability_results import ReachabilityConfig
from probes.reachability_scoring import Scorer
from probes.reachability_search import Walk, enumerate_controls, gradient_search

BUDGETS_MB = {"reachability": (6, 12, 64), "activation-attacks": (14, 26, 256)}
D_VOCAB, N_CONTEXT, N_TARGET, K = 8192, 64, 16, 6


def model():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=128, vocab_size=D_VOCAB, n_positions=128, initializer_range=0.1
    )
    return wb.wrap(GPT2LMHeadModel(config).eval().requires_grad_(False))


def reachability(attacked, budget_mb, n=96):
    scorer = Scorer(attacked, budget_mb << 20)
    config = ReachabilityConfig(candidates=n, batch=n, iterations=1)
    state = State(torch.zeros(0, dtype=torch.long), torch.arange(40), 0)
    walk = Walk(Pair(state, 7, 0), torch.arange(K), torch.Generator().manual_seed(0), D_VOCAB)
    gradient_search(scorer, [walk], config, lambda walk: None)
    enumerate_controls(scorer, state, [7], 1, n)
    return scorer.rows_at_once(40 + K)


def activation_attacks(attacked, budget_mb, n=8, steps=8):
    generator = torch.Generator().manual_seed(0)
    cases = Cases(
        torch.randint(D_VOCAB, (n, N_CONTEXT), generator=generator),
        torch.randint(D_VOCAB, (n, N_TARGET), generator=generator),
    )
    bench = make_bench(attacked, 0, cases, {1.0: torch.ones(128)})
    bench = replace(bench, budget_bytes=budget_mb << 20)
    problems = [Problem(Cell((4, 5)), N_TARGET, row) for row in range(n)]
    solve(bench, problems, Descent(steps=steps), Report(lambda *_: None))
    return problems_at_once(bench, problems)


def status_mb(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measured(search, attacked, budget_mb):
    """MB at the peak beyond what was there, and how many rows or problems went at once."""
    ctypes.CDLL(None).malloc_trim(0)
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    at_once = search(attacked, budget_mb)
    return status_mb("VmHWM") - before, at_once


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    attacked = model()
    reachability(attacked, 1, n=4)
    activation_attacks(attacked, 1, n=1, steps=1)
    searches = {"reachability": reachability, "activation-attacks": activation_attacks}
    found = {
        name: [measured(search, attacked, budget) for budget in BUDGETS_MB[name]]
        for name, search in searches.items()
    }
    sys.stdout.write(json.dumps(found))
