"""Peers of the sections of ``attacks.py`` that score candidates for a control.

All run gradient coordinate search on the same model, states, targets, length of control, candidates a
position and proposals a step: our search; a loop in the reference's style (``reference/``); nanogcg from
the package index, which is a peer of this table only and a row that failed where it is not installed.
Its filter of re-tokenisable text, a Python loop, is off, which is faster for it. The targets are ids
that these controls do not reach, so nobody stops early.

``sweep``: the k = 1 step for 75 targets of one state, in (target, token) pairs. Our search reads all
targets from one forward pass a token; the loop runs the vocabulary for each target, here for one of them.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a spawned process

Work = Callable[[], float]
SHAPES: dict[str, dict[str, int]] = {
    "demo": {},
    "wide": {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab_size": 50257},
}
BUDGET: dict[str, dict[str, int]] = {
    "demo": {"problems": 2, "steps": 2, "batch": 512},
    "wide": {"problems": 1, "steps": 1, "batch": 384},
}
K, CANDIDATES = 10, 128
TEXT = " truth universally acknowledged, that a single man in possession of a good fortune must be"
N_TARGETS = 75


def build(shape: str) -> Any:
    """A transformers model, the demo's or one with GPT-2's vocabulary, and the demo's tokenizer."""
    import torch

    import workbench as wb

    model = wb.load("demo")
    if not SHAPES[shape]:
        return model.model, model.tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], initializer_range=0.06)
    return GPT2LMHeadModel(config).eval().requires_grad_(False), model.tokenizer


def problems_of(shape: str, tokenizer: Any) -> list[tuple[str, Any, int]]:
    """(text of the state, its ids, target) of each problem."""
    import torch

    words = TEXT.split(" ")
    found = []
    for index in range(BUDGET[shape]["problems"]):
        state = " " + " ".join(words[1 + index :])
        ids = torch.tensor(tokenizer(state, add_special_tokens=False)["input_ids"])
        found.append((state, ids, 1000 + 37 * index))
    return found


def start_of(index: int) -> Any:
    """The control that a search begins with."""
    import torch

    return torch.randint(1000, (K,), generator=torch.Generator().manual_seed(index))


def ours(shape: str, memory_mb: int) -> Work:
    import torch

    import workbench as wb
    from probes.reachability_problems import Problem, State
    from probes.reachability_results import ReachabilityConfig
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import Walk, gradient_search

    network, tokenizer = build(shape)
    model, budget = wb.wrap(network), BUDGET[shape]
    config = ReachabilityConfig(
        k_max=K, candidates=CANDIDATES, iterations=budget["steps"], batch=budget["batch"]
    )

    def run() -> float:
        scorer = Scorer(model, memory_mb << 20)
        walks = []
        for index, (_, ids, target) in enumerate(problems_of(shape, tokenizer)):
            problem = Problem(State(ids[:0], ids, index), target, index)
            generator = torch.Generator().manual_seed(index)
            walks.append(Walk(problem, start_of(index), generator, len(tokenizer)))
        gradient_search(scorer, walks, config, lambda walk: None)
        assert not any(walk.best and walk.best.solved for walk in walks)
        return scorer.n_scored

    return run


def reference_loop(shape: str) -> Work:
    import torch

    from benchmarks.reference.reachability_loop import search

    network, tokenizer = build(shape)
    budget = BUDGET[shape]

    def run() -> float:
        scored = 0
        for index, (_, ids, target) in enumerate(problems_of(shape, tokenizer)):
            how = {"steps": budget["steps"], "candidates": CANDIDATES, "batch": budget["batch"]}
            goal = torch.tensor([target])
            scored += search(network, start_of(index), ids, goal, seed=index, **how)[1]
        return scored

    return run


def nanogcg_peer(shape: str) -> Work:
    """Run nanogcg; $NANOGCG may name a folder that holds the package."""
    if "NANOGCG" in os.environ:
        sys.path.insert(0, os.environ["NANOGCG"])
    try:
        import nanogcg
    except ImportError as error:
        raise RuntimeError("not installed") from error
    network, tokenizer = build(shape)
    budget = BUDGET[shape]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = nanogcg.GCGConfig(
        num_steps=budget["steps"],
        search_width=budget["batch"],
        topk=CANDIDATES,
        optim_str_init=" the" * K,
        filter_ids=False,
        use_prefix_cache=False,  # nothing stands before the control here
        seed=0,
        verbosity="ERROR",
    )

    def run() -> float:
        for state, _, target in problems_of(shape, tokenizer):
            word = tokenizer.decode([target])
            nanogcg.run(network, tokenizer, "{optim_str}" + state, word, config)
        return budget["problems"] * budget["steps"] * budget["batch"]

    return run


def sweep(memory_mb: int) -> Work:
    import workbench as wb
    from probes.reachability_problems import State
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import enumerate_controls

    network, tokenizer = build("demo")
    ids, targets = problems_of("demo", tokenizer)[0][1], list(range(300, 300 + N_TARGETS))

    def run() -> float:
        scorer = Scorer(wb.wrap(network), memory_mb << 20)
        enumerate_controls(scorer, State(ids[:0], ids, 0), targets, 1, len(tokenizer))
        return len(targets) * len(tokenizer)

    return run


def sweep_loop() -> Work:
    import torch

    from benchmarks.reference.reachability_loop import losses

    network, tokenizer = build("demo")
    ids = problems_of("demo", tokenizer)[0][1]

    def run() -> float:
        losses(network, torch.arange(len(tokenizer))[:, None], ids, torch.tensor([300]))
        return len(tokenizer)

    return run


def search_peers(shape: str) -> dict[str, Callable[[], Work]]:
    """Peers of one shape; the loop is the reference."""
    return {
        "workbench: shared prefix, last logits, 64 MB a pass": lambda: ours(shape, 64),
        "the same, 512 MB a pass": lambda: ours(shape, 512),
        "nanogcg": lambda: nanogcg_peer(shape),
        "loop in the reference's style": lambda: reference_loop(shape),
    }


def sweep_peers() -> dict[str, Callable[[], Work]]:
    """Peers of the k = 1 step."""
    return {
        "workbench: 75 targets from one sweep": lambda: sweep(64),
        "loop in the reference's style, a sweep a target": sweep_loop,
    }
