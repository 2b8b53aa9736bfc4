"""Attacks, many at once against one at a time: forced tokens, or tested candidates, per second.

Each section has a table of peers. A peer is built once in a process of its own and then does the same
work in every round; a round runs all peers in turn, so that drift of the machine hits all alike.
Reported are medians of the rate, the ratio to the section's reference, and each process's own peak
resident set beyond what it had with the model loaded.

    python benchmarks/attacks.py activations --rounds 3
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import turns
from attacks_candidates import BATCH, CANDIDATES, STORIES, search_peers, sweep_peers
from race import peak, products
from record import OUT, Row, ratios, spread, versions_of, write_record
from resident import forget_peak, memory_mb

Work = Callable[[], tuple[float, float]]
"""Does the work once and returns how much was done, in the section's unit; and with repeats counted."""


@dataclass(frozen=True)
class Section:
    """What is compared."""

    name: str
    unit: str
    peers: dict[str, Callable[[], Work]]
    """By name, what builds a peer; the last one is the reference of the ratios."""


# activation-attacks

ATTACK: dict[str, int] = {"context": 96, "n_attacked": 2, "t": 6, "problems": 16, "steps": 100}
"""The last two of 96 positions of the demo model, six tokens, 16 contexts."""


def attack_bench() -> Any:
    """The demo model with 16 contexts and targets drawn for it: (bench, problems, descent), for every peer."""
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
    """Ours: all problems at once or ``at_most`` so many, under a memory budget in MB; counts forced tokens."""
    from dataclasses import replace

    from probes.activation_attacks_solve import Report, solve

    bench, problems, descent = attack_bench()
    bench = replace(bench, at_most=at_most, budget_bytes=memory_mb << 20)

    def run() -> tuple[float, float]:
        found: dict[Any, Any] = {}
        solve(bench, problems, descent, Report(found.__setitem__))
        forced = sum(each.n_correct for each in found.values())
        return forced, forced

    return run


def plain_loop() -> Work:
    """What one writes first (``reference/activation_attack_loop.py``)."""
    from reference.activation_attack_loop import attack

    bench, problems, descent = attack_bench()
    model, places = bench.model.model, list(problems[0].cell.positions)

    def run() -> tuple[float, float]:
        pairs = zip(bench.cases.contexts, bench.cases.targets[:, : ATTACK["t"]], strict=True)
        options = {"steps": descent.steps, "lr": descent.lr}
        forced = sum(attack(model, *pair, places, **options) for pair in pairs)
        return forced, forced

    return run


SECTIONS: dict[str, Section] = {
    "activations": Section(
        "demo model, 16 contexts, 6 tokens each",
        "tokens / s",
        {
            "workbench": lambda: batched(None),
            "workbench, memory_mb=16": lambda: batched(None, 16),
            "workbench, one at a time": lambda: batched(1),
            "plain loop": plain_loop,
        },
    ),
    "demo": Section("demo model, k = 4, 6, 8, 10", "candidates / s", search_peers("demo")),
    "stories": Section("stories260K, k = 4, 6, 8, 10", "candidates / s", search_peers("stories")),
    "wide": Section(
        "6 layers, d_model 192, GPT-2's vocabulary, k = 8", "candidates / s", search_peers("wide")
    ),
    "sweep": Section("demo model, k = 1, 75 targets of one state", "pairs / s", sweep_peers()),
}


def serve(section: str, name: str, threads: int, pipe: Connection) -> None:
    """Run one peer whenever it is asked; says amount, peak memory and products once."""
    import torch

    def build() -> turns.Built:
        torch.set_num_threads(threads)
        run = SECTIONS[section].peers[name]()
        before = memory_mb("VmRSS")
        forget_peak()
        done, rows = run()
        extra_mb = memory_mb("VmHWM") - before
        flops = products(run) / done
        speed = peak(threads, torch.float32)
        told = {"done": done, "rows": rows, "extra_mb": extra_mb, "flops": flops, "peak": speed}
        return told, run, turns.nothing

    turns.serve(pipe, build)


def measure(section: str, rounds: int, threads: int) -> dict[str, Any]:
    """Interleaved rounds over the peers of a section."""
    tasks = {name: (section, name, threads) for name in SECTIONS[section].peers}
    return turns.in_turn(serve, tasks, rounds)


def rows_of(section: str, peers: dict[str, Any], threads: int) -> list[Row]:
    """The section's rows; ratios are to its last peer, round by round.

    The limit is the rate at which the fewest products that a peer needs for one thing could be made.
    """
    reference, built = list(peers.values())[-1], [one for one in peers.values() if "flops" in one]
    limit = max((one["peak"] for one in built), default=0.0) / min(
        (one["flops"] for one in built), default=1.0
    )
    return [_row(section, peer, found, reference, limit, threads) for peer, found in peers.items()]


def _row(
    section: str,
    peer: str,
    found: dict[str, Any],
    reference: dict[str, Any],
    limit: float,
    threads: int,
) -> Row:
    about = {"name": SECTIONS[section].name, "peer": peer, "threads": threads}
    if "nanogcg" in peer:
        about["version"] = versions_of("nanogcg")["nanogcg"]
    if "error" in found or "error" in reference:
        return Row(**about, note=f"failed: {found.get('error', reference.get('error'))}")

    def rates(one: dict[str, Any], time_of: str) -> list[float]:
        return [one["done"] / spent for spent in one[time_of]]

    cpu = ratios(rates(found, "cpu"), rates(reference, "cpu"))
    note = f"by CPU time {cpu['ratio_least']:.1f}-{cpu['ratio_most']:.1f}"
    if section == "activations":
        note += f"; {found['done']:.0f} tokens forced"
    repeats = found["rows"] / found["done"]
    if repeats != 1 or reference["rows"] != reference["done"]:
        by_rows = cpu["ratio"] * repeats / (reference["rows"] / reference["done"])
        note += (
            f"; {by_rows:.1f} by CPU time with repeats counted ({1 - 1 / repeats:.0%} of its rows)"
        )
    reached = spread(rates(found, "seconds"))
    return Row(
        **about,
        **reached,
        limit=limit,
        distance=limit / reached["median"],
        **ratios(rates(found, "seconds"), rates(reference, "seconds")),
        unit=SECTIONS[section].unit,
        cpu_ratio=cpu["ratio"],
        peak_memory=found["extra_mb"],
        note=note,
    )


def main() -> None:
    """Measure the sections, print, and write a record of each kind after every section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.sections = arguments.sections or list(SECTIONS)
    if "stories" in arguments.sections and not STORIES.is_dir():
        print(f"stories: left out, {STORIES.name} is not at hand", file=sys.stderr)
        arguments.sections.remove("stories")
    found: dict[str, list[Row]] = {"attacks_activations": [], "attacks_candidates": []}
    for name in arguments.sections:
        peers = measure(name, arguments.rounds, arguments.threads)
        record = "attacks_activations" if name == "activations" else "attacks_candidates"
        found[record] += rows_of(name, peers, arguments.threads)
        for row in found[record][-len(peers) :]:
            rate = "" if row.median is None else f"{row.median:.1f} {row.unit}, x{row.ratio:.2f}"
            print(f"{row.name}: {row.peer}: {rate}, CPU x{row.cpu_ratio}  {row.note}", flush=True)
        _write(record, found[record], arguments)


def _write(record: str, rows: list[Row], arguments: argparse.Namespace) -> None:
    sections = [
        name for name in arguments.sections if (name == "activations") == ("acti" in record)
    ]
    conditions = f"{arguments.rounds} interleaved rounds"
    if record == "attacks_candidates":
        conditions += (
            f"; {CANDIDATES} candidates a position and {BATCH} proposals a step (as 128 and 768)"
        )
    write_record(
        record,
        rows,
        command=f"python benchmarks/attacks.py {' '.join(sections)} --rounds {arguments.rounds}",
        ratio_means="rate over the plain loop's, by wall time",
        better="higher",
        conditions=conditions,
        packages=("torch", "transformers", "nanogcg"),
        path=arguments.output / f"{record}.json",
    )


if __name__ == "__main__":
    main()
