"""Peers of the sections of ``attacks.py`` that score candidates for a control.

All run gradient coordinate search on the same model, states, targets, lengths of control, candidates a
position and proposals a step: our search; a loop in the reference's style (``reference/``); nanogcg from
the package index, which is a peer of this table only and a row that failed where it is not installed.
Its filter of re-tokenisable text, a Python loop, is off, which is faster for it. The targets are ids
that these controls do not reach, so nobody stops early.

Lengths are those of the back-off, and proposals a step are six times the candidates a position, as in the
paper (128 and 768); less of both, for time. What counts is a control that was not scored before in the
same step: the loop and nanogcg draw with repetition, at these proportions 25 to 48 % of their rows are
repeats. Rows with their repeats are told beside it.

``sweep``: the k = 1 step for 75 targets of one state, in (target, token) pairs. Our search reads all
targets from one forward pass a token; the loop runs the vocabulary for each target, here for one of them.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a spawned process

Work = Callable[[], tuple[float, float]]
STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
WIDE: dict[str, int] = {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab_size": 50257}
LENGTHS: dict[str, tuple[int, ...]] = {
    "demo": (4, 6, 8, 10),
    "stories": (4, 6, 8, 10),
    "wide": (8,),
}
CANDIDATES = 32
BATCH = 6 * CANDIDATES
TEXT = " truth universally acknowledged, that a single man in possession of a good fortune must be"
N_TARGETS = 75


def build(shape: str) -> Any:
    """A transformers model (trained, or with GPT-2's vocabulary and random weights), and a tokenizer."""
    import torch

    import workbench as wb

    model = wb.load(str(STORIES) if shape == "stories" else "demo")
    if shape != "wide":
        return model.model, model.tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**WIDE, initializer_range=0.06)
    return GPT2LMHeadModel(config).eval().requires_grad_(False), model.tokenizer


def problems_of(shape: str, tokenizer: Any) -> list[tuple[str, Any, int]]:
    """(text of the state, its ids, target) of the problem of each length."""
    import torch

    words = TEXT.split(" ")
    found = []
    for index in range(len(LENGTHS[shape])):
        state = " " + " ".join(words[1 + index :])
        ids = torch.tensor(tokenizer(state, add_special_tokens=False)["input_ids"])
        found.append((state, ids, (1000 + 37 * index) % len(tokenizer)))
    return found


def start_of(index: int, k: int) -> Any:
    """The control that a search begins with."""
    import torch

    return torch.randint(300, (k,), generator=torch.Generator().manual_seed(index))


def ours(shape: str, memory_mb: int) -> Work:
    """The workbench's search on every problem of a shape, within so many MB; counts scored controls."""
    import torch

    import workbench as wb
    from probes.reachability_problems import Problem, State
    from probes.reachability_results import ReachabilityConfig
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import Walk, gradient_search

    network, tokenizer = build(shape)
    model = wb.wrap(network)
    config = ReachabilityConfig(candidates=CANDIDATES, iterations=1, batch=BATCH)

    scorer = Scorer(model, memory_mb << 20)  # one serves all pairs of a search

    def run() -> tuple[float, float]:
        before = scorer.n_scored
        for index, (_, ids, target) in enumerate(problems_of(shape, tokenizer)):
            problem = Problem(State(ids[:0], ids, index), target, index)
            generator = torch.Generator().manual_seed(index)
            start = start_of(index, LENGTHS[shape][index])
            walk = Walk(problem, start, generator, len(tokenizer))
            gradient_search(scorer, [walk], config, lambda walk: None)
            assert walk.best is not None
            assert not walk.best.solved
        done = scorer.n_scored - before
        return done, done

    return run


def reference_loop(shape: str) -> Work:
    """The paper's loop (``reference/reachability_loop.py``) on the same problems."""
    import torch
    from reference.reachability_loop import search

    network, tokenizer = build(shape)

    def run() -> tuple[float, float]:
        fresh = rows = 0
        for index, (_, ids, target) in enumerate(problems_of(shape, tokenizer)):
            how = {"steps": 1, "candidates": CANDIDATES, "batch": BATCH}
            start, goal = start_of(index, LENGTHS[shape][index]), torch.tensor([target])
            _, proposals = search(network, start, ids, goal, seed=index, **how)
            fresh += sum(len(each.unique(dim=0)) for each in proposals)
            rows += sum(map(len, proposals))
        return fresh, rows

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
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    counts = _count_proposals(nanogcg)

    def run() -> tuple[float, float]:
        counts.clear()
        for index, (state, _, target) in enumerate(problems_of(shape, tokenizer)):
            config = nanogcg.GCGConfig(
                num_steps=1,
                search_width=BATCH,
                topk=CANDIDATES,
                optim_str_init=" the" * LENGTHS[shape][index],
                filter_ids=False,
                use_prefix_cache=False,  # nothing stands before the control here
                seed=0,
                verbosity="ERROR",
            )
            word = tokenizer.decode([target])
            nanogcg.run(network, tokenizer, "{optim_str}" + state, word, config)
        return sum(fresh for fresh, _ in counts), sum(rows for _, rows in counts)

    return run


def _count_proposals(nanogcg: Any) -> list[tuple[int, int]]:
    """Proposals of each step that are different, and all of them, while nanogcg runs."""
    counts: list[tuple[int, int]] = []
    draw = nanogcg.gcg.sample_ids_from_grad

    def counted(*arguments: Any, **options: Any) -> Any:
        proposals = draw(*arguments, **options)
        counts.append((len(proposals.unique(dim=0)), len(proposals)))
        return proposals

    nanogcg.gcg.sample_ids_from_grad = counted
    return counts


def sweep(memory_mb: int) -> Work:
    """The workbench's exhaustive search for controls of one token, within so many MB."""
    import workbench as wb
    from probes.reachability_problems import State
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import enumerate_controls

    network, tokenizer = build("demo")
    ids, targets = problems_of("demo", tokenizer)[0][1], list(range(300, 300 + N_TARGETS))

    def run() -> tuple[float, float]:
        scorer = Scorer(wb.wrap(network), memory_mb << 20)
        enumerate_controls(scorer, State(ids[:0], ids, 0), targets, 1, len(tokenizer))
        done = len(targets) * len(tokenizer)
        return done, done

    return run


def sweep_loop() -> Work:
    import torch
    from reference.reachability_loop import losses

    network, tokenizer = build("demo")
    ids = problems_of("demo", tokenizer)[0][1]

    def run() -> tuple[float, float]:
        losses(network, torch.arange(len(tokenizer))[:, None], ids, torch.tensor([300]))
        return len(tokenizer), len(tokenizer)

    return run


def search_peers(shape: str) -> dict[str, Callable[[], Work]]:
    """Peers of one shape; the loop is the reference."""
    return {
        "workbench": lambda: ours(shape, 64),
        "nanogcg": lambda: nanogcg_peer(shape),
        "plain loop": lambda: reference_loop(shape),
    }


def sweep_peers() -> dict[str, Callable[[], Work]]:
    """Peers of the k = 1 step."""
    return {
        "workbench": lambda: sweep(64),
        "plain loop": sweep_loop,
    }
