"""Candidates scored per second: our search for controls, a loop in the reference's style, nanogcg.

All three run gradient coordinate search on the same model, states, targets, length of control,
candidates a position and proposals a step. The loop is ``reference/reachability_loop.py``; nanogcg is
the package of that name (a peer for this table only; "not installed" where it is missing), with its
Python filter of re-tokenisable text off, which is faster for it. Methods are asked in turn, round after
round; medians of the ratios of wall and of CPU time. A second table has the sweep of the vocabulary
for 75 targets of one state, which our search scores from one forward pass a token.

    python benchmarks/attacks_candidates.py --rounds 3 --threads 1 [--nanogcg FOLDER]
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
OUT = Path(__file__).parent / "out" / "attacks_candidates.json"
SHAPES: dict[str, dict[str, int]] = {
    "demo": {},
    "narrow, 50257 tokens": {"n_layer": 6, "n_head": 6, "n_embd": 192, "vocab_size": 50257},
}
UNREACHABLE = -1
"""No token wins with this id, so no method stops before its budget is spent."""


def build(shape: str) -> Any:
    """A transformers model and the demo's tokenizer."""
    import torch

    import workbench as wb

    model = wb.load("demo")
    if not SHAPES[shape]:
        return model.model, model.tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], initializer_range=0.06)
    return GPT2LMHeadModel(config).eval(), model.tokenizer


def problems_of(tokenizer: Any, arguments: argparse.Namespace) -> list[tuple[str, Any, int]]:
    """(text of the state, its ids, target) of each problem."""
    import torch

    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    )
    words = text.split(" ")
    found = []
    for index in range(arguments.problems):
        state = " " + " ".join(words[index % 4 :])
        ids = torch.tensor(tokenizer(state, add_special_tokens=False)["input_ids"])
        found.append((state, ids, 1000 + 37 * index))
    return found


def ours(network: Any, tokenizer: Any, arguments: argparse.Namespace) -> Callable[[], int]:
    """Our search, all problems together."""
    import torch

    import workbench as wb
    from probes.reachability_problems import Problem, State
    from probes.reachability_results import ReachabilityConfig
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import Walk, gradient_search

    model = wb.wrap(network)
    config = ReachabilityConfig(
        k_max=arguments.k,
        candidates=arguments.candidates,
        iterations=arguments.steps,
        batch=arguments.batch,
        memory_mb=arguments.memory_mb,
    )

    def run() -> int:
        scorer = Scorer(model, config.memory_mb << 20)
        walks = []
        for index, (_, ids, target) in enumerate(problems_of(tokenizer, arguments)):
            problem = Problem(State(ids[:0], ids, index), target, index)
            generator = torch.Generator().manual_seed(index)
            start = torch.randint(1000, (arguments.k,), generator=generator)
            walks.append(Walk(problem, start, generator, len(tokenizer)))
        gradient_search(scorer, walks, config, lambda walk, step: None)
        return scorer.n_scored

    return run


def loop(network: Any, tokenizer: Any, arguments: argparse.Namespace) -> Callable[[], int]:
    """The loop in the reference's style, problem after problem."""
    import torch

    from benchmarks.reference.reachability_loop import search

    def run() -> int:
        scored = 0
        for index, (_, ids, target) in enumerate(problems_of(tokenizer, arguments)):
            start = torch.randint(
                1000, (arguments.k,), generator=torch.Generator().manual_seed(index)
            )
            scored += search(
                network,
                start,
                ids,
                torch.tensor([target]),
                steps=arguments.steps,
                candidates=arguments.candidates,
                batch=arguments.batch,
                seed=index,
            )[1]
        return scored

    return run


def peer(network: Any, tokenizer: Any, arguments: argparse.Namespace) -> Callable[[], int] | None:
    """Run nanogcg, problem after problem; None where it is not installed."""
    if arguments.nanogcg:
        sys.path.insert(0, arguments.nanogcg)
    try:
        import nanogcg
    except ImportError:
        return None
    import logging

    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = nanogcg.GCGConfig(
        num_steps=arguments.steps,
        search_width=arguments.batch,
        topk=arguments.candidates,
        optim_str_init=" the" * arguments.k,
        filter_ids=False,
        use_prefix_cache=False,
        seed=0,
        verbosity="ERROR",
    )

    def run() -> int:
        for state, _, target in problems_of(tokenizer, arguments):
            word = tokenizer.decode([target])
            nanogcg.run(network, tokenizer, "{optim_str}" + state, word, config)
        return arguments.problems * arguments.steps * arguments.batch

    return run


def sweeps(network: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a (target, token) pair of the k = 1 step for 75 targets of one state."""
    import torch

    import workbench as wb
    from benchmarks.reference.reachability_loop import losses
    from probes.reachability_problems import State
    from probes.reachability_scoring import Scorer
    from probes.reachability_search import enumerate_controls

    _, ids, _ = problems_of(tokenizer, arguments)[0]
    targets = list(range(300, 375))
    start = time.process_time()
    scorer = Scorer(wb.wrap(network), arguments.memory_mb << 20)
    enumerate_controls(scorer, State(ids[:0], ids, 0), targets, 1, len(tokenizer))
    own = (time.process_time() - start) / (75 * len(tokenizer))
    start = time.process_time()
    every = torch.arange(len(tokenizer))[:, None]
    losses(network, every, ids, torch.tensor(targets[:1]))
    return {"workbench": own, "loop": (time.process_time() - start) / len(tokenizer)}


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a candidate of every method, round after round, and their ratios to ours."""
    network, tokenizer = build(shape)
    made = {
        "workbench": ours(network, tokenizer, arguments),
        "loop": loop(network, tokenizer, arguments),
        "nanogcg": peer(network, tokenizer, arguments),
    }
    methods = {name: run for name, run in made.items() if run is not None}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for round_ in range(-1, arguments.rounds):  # the first warms up and is not counted
        for name, run in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            scored = run()
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if round_ >= 0:
                seconds[name].append((spent[0] / scored, spent[1] / scored))
    found: dict[str, Any] = {"not installed": [name for name in made if name not in methods]}
    for name, spent in seconds.items():
        ratios = [
            [
                one[clock] / mine[clock]
                for one, mine in zip(spent, seconds["workbench"], strict=True)
            ]
            for clock in (0, 1)
        ]
        found[name] = {
            "candidates a second": 1 / statistics.median(wall for wall, _ in spent),
            "candidates a CPU second": 1 / statistics.median(cpu for _, cpu in spent),
            "workbench is faster by (wall)": [
                min(ratios[0]),
                statistics.median(ratios[0]),
                max(ratios[0]),
            ],
            "workbench is faster by (CPU)": [
                min(ratios[1]),
                statistics.median(ratios[1]),
                max(ratios[1]),
            ],
        }
    found["sweep, CPU seconds a pair"] = sweeps(network, tokenizer, arguments)
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "rounds": 3,
        "threads": 1,
        "problems": 3,
        "steps": 2,
        "batch": 512,
        "candidates": 128,
        "k": 10,
        "memory_mb": 64,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--nanogcg", default="", help="folder that holds the package")
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES))
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    found = {shape: measure(shape, arguments) for shape in arguments.shape}
    found["settings"] = vars(arguments) | {"nanogcg": bool(arguments.nanogcg)}
    found["peak resident set, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
