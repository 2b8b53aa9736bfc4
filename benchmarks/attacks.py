"""Attacks, many at once against one at a time: forced tokens, or tested candidates, per second.

Each section has a table of peers. A peer is built once in a process of its own and then does the same
work in every round; a round runs all peers in turn, so that drift of the machine hits all alike.
Reported are medians of the rate, the ratio to the section's reference, and each process's own peak
resident set beyond what it had with the model loaded. One JSON file a section.

    python benchmarks/attacks.py activations --rounds 3
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from attacks_candidates import search_peers, sweep_peers
from capture import forget_peak, memory_mb

OUT = Path(__file__).parent / "out"

Work = Callable[[], float]
"""Does the work once and returns how much was done, in the section's unit."""


@dataclass(frozen=True)
class Section:
    """What is compared."""

    unit: str
    peers: dict[str, Callable[[], Work]]
    """By name, what builds a peer; the last one is the reference of the ratios."""


# activation-attacks

ATTACK: dict[str, int] = {"context": 96, "n_attacked": 2, "t": 6, "problems": 16, "steps": 100}
"""The last two of 96 positions of the demo model, six tokens, 16 contexts."""


def attack_bench() -> Any:
    import torch

    import workbench as wb
    from probes.activation_attacks_bench import Cell, Problem, make_bench
    from probes.activation_attacks_cases import draw_cases
    from probes.activation_attacks_config import ActivationAttackConfig
    from workbench.context import Context

    model = wb.load("demo")
    config = ActivationAttackConfig(
        n_attacked=(ATTACK["n_attacked"],),
        context=ATTACK["context"],
        n_seeds=ATTACK["problems"],
        steps=ATTACK["steps"],
        t_limit=ATTACK["t"],
    )
    cases = draw_cases(model, torch.zeros(0, 0, dtype=torch.long), config, Context())
    bench = make_bench(model, 0, cases, {1.0: torch.ones(model.spec.d_model)})
    places = range(ATTACK["context"] - ATTACK["n_attacked"], ATTACK["context"])
    problems = [Problem(Cell(tuple(places)), ATTACK["t"], row) for row in range(config.n_seeds)]
    return bench, problems, config.descent


def batched(at_most: int | None, memory_mb: int = 1024) -> Work:
    from dataclasses import replace

    from probes.activation_attacks_bench import Report, solve

    bench, problems, descent = attack_bench()
    bench = replace(bench, at_most=at_most, budget_bytes=memory_mb << 20)

    def run() -> float:
        found: dict[Any, Any] = {}
        solve(bench, problems, descent, Report(found.__setitem__))
        return sum(each.n_correct for each in found.values())

    return run


def plain_loop() -> Work:
    """What one writes first: a hook, torch's Adam, one problem after the other, early stop."""
    import torch

    bench, problems, descent = attack_bench()
    model = bench.model.model
    places = list(problems[0].cell.positions)

    def attack(context: torch.Tensor, target: torch.Tensor) -> int:
        tokens = torch.cat([context, target[:-1]])[None]
        change = torch.zeros(len(places), model.config.n_embd, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=descent.lr)

        def perturb(module: Any, args: tuple[Any, ...]) -> Any:
            hidden = args[0].clone()
            hidden[:, places] += change
            return (hidden, *args[1:])

        best = 0
        hook = model.transformer.h[0].register_forward_pre_hook(perturb)
        try:
            for _ in range(descent.steps + 1):
                logits = model(tokens, use_cache=False).logits[0, len(context) - 1 :]
                best = max(best, int((logits.argmax(-1) == target).sum()))
                if best == len(target):
                    break
                loss = torch.nn.functional.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            hook.remove()
        return best

    def run() -> float:
        t = ATTACK["t"]
        pairs = zip(bench.cases.contexts, bench.cases.targets[:, :t], strict=True)
        return sum(attack(context, target) for context, target in pairs)

    return run


SECTIONS: dict[str, Section] = {
    "activations": Section(
        "forced tokens",
        {
            "workbench: batched, prefix once, early exit and refill": lambda: batched(None),
            "the same, 64 MB of working memory": lambda: batched(None, 64),
            "the same, one at a time": lambda: batched(1),
            "plain loop: hook and torch's Adam, one at a time": plain_loop,
        },
    ),
    "candidates": Section("scored candidates", search_peers("demo")),
    "candidates-wide": Section("scored candidates, 50,257 tokens", search_peers("wide")),
    "sweep": Section("(target, token) pairs", sweep_peers()),
}


def serve(section: str, name: str, threads: int, pipe: Connection) -> None:
    """Run one peer whenever the coordinator asks; answer with amount, seconds and peak memory."""
    import torch

    torch.set_num_threads(threads)
    try:
        run = SECTIONS[section].peers[name]()
        before = memory_mb("VmRSS")
        forget_peak()
        pipe.send({"done": run(), "extra_mb": memory_mb("VmHWM") - before})
        while pipe.recv() == "run":
            start, cpu = time.perf_counter(), time.process_time()
            done = run()
            pipe.send(
                {
                    "done": done,
                    "seconds": time.perf_counter() - start,
                    "cpu": time.process_time() - cpu,
                }
            )
    except Exception as error:  # a peer that fails is a row of the table
        pipe.send({"error": f"{type(error).__name__}: {error}"[:200]})


def measure(section: str, rounds: int, threads: int) -> dict[str, Any]:
    """Interleaved rounds over the peers of a section."""
    context = multiprocessing.get_context("spawn")
    workers, rows = {}, {}
    for name in SECTIONS[section].peers:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(section, name, threads, theirs), daemon=True)
        process.start()
        rows[name] = ours.recv() | {"seconds": [], "cpu": []}
        if "error" not in rows[name]:
            workers[name] = (process, ours)
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send("run")
            answer = pipe.recv()
            rows[name]["seconds"].append(answer["seconds"])
            rows[name]["cpu"].append(answer["cpu"])
    for process, pipe in workers.values():
        pipe.send("stop")
        process.join()
    return rows


def summarise(rows: dict[str, Any]) -> None:
    """Add rates and their ratio to the last peer's, round by round."""
    reference = list(rows.values())[-1]
    for row in rows.values():
        if "error" in row or "error" in reference:
            continue
        row["per_second"] = row["done"] / statistics.median(row["seconds"])
        pairs = zip(row["seconds"], reference["seconds"], strict=True)
        ratios = [row["done"] / a / (reference["done"] / b) for a, b in pairs]
        row["ratio"], row["ratio_min"], row["ratio_max"] = (
            statistics.median(ratios),
            min(ratios),
            max(ratios),
        )
        cpu = zip(row["cpu"], reference["cpu"], strict=True)
        row["cpu_ratio"] = statistics.median(
            row["done"] / a / (reference["done"] / b) for a, b in cpu
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        rows = measure(name, arguments.rounds, arguments.threads)
        summarise(rows)
        report = {
            "section": name,
            "unit": SECTIONS[name].unit,
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "versions": {package: version(package) for package in ("torch", "transformers")},
            "peers": rows,
        }
        (arguments.output / f"attacks_{name}.json").write_text(json.dumps(report, indent=1))
        print(f"\n{name}: {SECTIONS[name].unit} per second")
        for peer, row in rows.items():
            if "per_second" not in row:
                print(f"  {peer:58s} failed: {row.get('error')}")
                continue
            spread = f"{row['ratio_min']:.1f}-{row['ratio_max']:.1f}"
            print(
                f"  {peer:58s} {row['per_second']:8.1f}  x{row['ratio']:.1f} ({spread}), CPU "
                f"x{row['cpu_ratio']:.1f}  {row['done']:.0f} done, +{row['extra_mb']:.0f} MB"
            )


if __name__ == "__main__":
    main()
