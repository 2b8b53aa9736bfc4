"""Tokens per second under an edit of all heads, against stock ``generate`` and others' ways to the same edit.

One model of random weights, float32, greedy. The methods are asked in turn, round by round, in one
process; for peak memory each runs once more in a process of its own. A hook on the unembedding notes the
time of every forward pass: the first is the prompt's, the others are decoded tokens. Methods that make
the same edit must agree in their first logits and in every token before anything is reported.

    python benchmarks/generate.py                       # all cases, and the memory of one
    python benchmarks/generate.py --case short --rounds 5 --threads 1
    python benchmarks/generate.py --case long-batch --rounds 2 --methods stock "zerotuning score" nnsight
    python benchmarks/generate.py --case long --rounds 0 --memory

Rows that are measured again take the place of what the file has; the others stay, so that a case can be
measured in parts.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from generate_methods import CASES, METHODS, PEERS, SAME_EDIT, WHY
from peaks import Decoder, limits
from record import OUT, Row, ratios, read_record, spread, write_record
from resident import memory_mb

ROUNDS = {"short": 5, "short-batch": 3, "long": 3, "long-batch": 2}
"""Every case of the page, and its rounds where none are given."""
WITH_MEMORY = ("long",)
"""Cases whose peak memory is on the page."""
TOLERANCE = 1e-3
"""How far first logits of one edit may lie apart (they are about 10)."""


class Method:
    """One method, built and warm; every ask gives wall and CPU seconds of prompt and decoding."""

    def __init__(self, name: str, case: dict[str, Any]) -> None:
        import torch

        self.case, self.name = case, name
        unembedding, self.run = METHODS[name](case)
        self.stamps: list[tuple[float, float]] = []
        self.first: list[Any] = []
        unembedding.register_forward_hook(self.note)
        generator = torch.Generator().manual_seed(1)
        size = (case["batch"], case["n_pos"])
        self.tokens = torch.randint(1, case["model"]["vocab_size"], size, generator=generator)
        self.run(self.tokens[:, :8], 2)  # what is made once is made here

    def note(self, module: Any, args: Any, logits: Any) -> None:
        """Note the time of a forward pass, and the first one's last logits."""
        self.stamps.append(now())
        if not self.first:
            self.first.append(logits[:, -1].clone())

    def ask(self) -> dict[str, Any]:
        """Generate once."""
        self.stamps.clear()
        self.first.clear()
        start = now()
        found = self.run(self.tokens, self.case["n_new"])
        end, n_steps = now(), len(self.stamps) - 1
        assert n_steps == self.case["n_new"] - 1, (self.name, n_steps)
        answer: dict[str, Any] = {"tokens": found.tolist(), "first": self.first[0].tolist()}
        for index, kind in enumerate(("wall", "cpu")):
            answer[f"whole_{kind}"] = end[index] - start[index]
            decoding = self.stamps[-1][index] - self.stamps[0][index]
            answer[f"decode_{kind}"] = decoding / n_steps
        return answer


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def measure(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Interleaved rounds over all methods, in one process."""
    import torch

    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        methods = {name: Method(name, case) for name in arguments.methods}
        print("built", flush=True)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        for number in range(arguments.rounds):
            # Every other round backwards: what comes after what must not matter.
            for name in list(methods)[:: 1 if number % 2 == 0 else -1]:
                rounds[name].append(methods[name].ask())
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
    return rounds


def peak_of(name: str, case: dict[str, Any], threads: int, pipe: Connection) -> None:
    """Run one method once and send the largest resident set of this process, in MiB."""
    import torch

    torch.set_num_threads(threads)
    with torch.no_grad():
        Method(name, case).ask()
    pipe.send(memory_mb("VmHWM"))


def peaks(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, float]:
    """Peak memory of every method, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in arguments.methods:
        ours, theirs = context.Pipe()
        task = (name, case, arguments.threads, theirs)
        process = context.Process(target=peak_of, args=task, daemon=True)
        process.start()
        found[name] = ours.recv()
        process.join()
    return found


def agree(rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to report methods that do not make the same edit.

    Raises:
        SystemExit: First logits or tokens differ.
    """
    import torch

    same = [name for name in SAME_EDIT if name in rounds]
    wanted = rounds[same[0]][0]
    for name in same[1:]:
        found = rounds[name][0]
        apart = (torch.tensor(found["first"]) - torch.tensor(wanted["first"])).abs().max().item()
        equal = found["tokens"] == wanted["tokens"]
        print(f"{name}: first logits {apart:.1e} apart from ours, tokens equal: {equal}")
        if apart > TOLERANCE or not equal:
            raise SystemExit(f"{name} does not make the edit of {same[0]}")
    if "stock" in rounds and rounds["stock"][0]["first"] == wanted["first"]:
        raise SystemExit("the edit changes nothing: nothing is measured")


def rows_of(
    rounds: dict[str, list[dict[str, Any]]],
    case: dict[str, Any],
    shape: str,
    threads: int,
) -> list[Row]:
    """Tokens per second of the whole and of decoding alone, and their ratios to stock, round by round."""
    rows = []
    n_tokens = case["batch"] * case["n_new"]
    for name, found in rounds.items():
        for part, per_run in (("whole", n_tokens), ("decode", case["batch"])):
            speeds = [per_run / each[f"{part}_wall"] for each in found]
            # CPU time, which other work on the machine disturbs less.
            cpu, wall = (
                ratios(
                    [each[f"{part}_{kind}"] for each in rounds["stock"]],
                    [each[f"{part}_{kind}"] for each in found],
                )
                for kind in ("cpu", "wall")
            )
            stock = [per_run / each[f"{part}_wall"] for each in rounds["stock"]]
            rows.append(
                Row(
                    **identity(name, part, shape),
                    threads=threads,
                    unit="tokens / s",
                    **spread(speeds),
                    **cpu,
                    limit=statistics.median(stock),
                    distance=1.0 / cpu["ratio"],
                    note=f"by wall time {wall['ratio']:.2f}",
                    why=WHY.get(name, {}).get(part, ""),
                )
            )
    return rows


def limit_rows(case: dict[str, Any], shape: str, threads: int) -> list[Row]:
    """What decoding can reach at most on this machine, by arithmetic and by bandwidth, half-way through."""
    import torch

    torch.set_num_threads(threads)
    decoder, batch = Decoder.gpt2(case["model"]), case["batch"]
    cached = case["n_pos"] + case["n_new"] // 2
    flops = decoder.flops(1, unembed=True, cached=cached, batch=batch)
    n_bytes = decoder.n_bytes(unembed=True, cached=cached, batch=batch)
    return [
        Row(
            name=f"decode, no edit; {shape}",
            peer=f"most by {kind}",
            threads=threads,
            median=batch / seconds,
            unit="tokens / s",
            note=f"a step: {how}",
        )
        for kind, (seconds, how) in limits(flops, n_bytes).items()
    ]


def merged(kept: list[Row], rows: list[Row]) -> list[Row]:
    """What was measured before, with what was measured now in its place."""
    new = {(row.name, row.peer): row for row in rows}
    return [new.pop((row.name, row.peer), row) for row in kept] + list(new.values())


def with_peaks(rows: list[Row], shape: str, memory: dict[str, float]) -> list[Row]:
    """Rows of one shape with the peak memory of their methods."""
    peak = {
        (each["name"], each["peer"]): size
        for name, size in memory.items()
        for each in (identity(name, part, shape) for part in ("whole", "decode"))
    }
    return [
        dataclasses.replace(row, peak_memory=peak.get((row.name, row.peer), row.peak_memory))
        for row in rows
    ]


def identity(method: str, part: str, shape: str) -> dict[str, Any]:
    """Which row it is; methods that make one edit share a name, and are compared."""
    outside = PEERS.get(method) or ("transformers" if method in ("stock", SAME_EDIT[1]) else None)
    edit = "no edit" if method == "stock" else SAME_EDIT[0] if method in SAME_EDIT else method
    return {
        "name": f"{part}, {edit}; {shape}",
        "peer": method if outside else f"workbench, {method}",
        "version": version(outside) if outside else None,
    }


def measure_case(name: str, arguments: argparse.Namespace) -> None:
    """Measure one case, put its rows into the record and print them."""
    case = CASES[name]
    shape = f"{case['model']['n_layer']} layers, T={case['n_pos']}, batch {case['batch']}, {case['n_new']} new"
    rounds = ROUNDS.get(name, 3) if arguments.rounds is None else arguments.rounds
    arguments = argparse.Namespace(**{**vars(arguments), "rounds": rounds})
    kept = read_record(arguments.output)["rows"] if arguments.output.is_file() else []
    rows = []
    if arguments.rounds:
        found = measure(arguments, case)
        agree(found)
        rows = rows_of(found, case, shape, arguments.threads)
        rows += limit_rows(case, shape, arguments.threads)
    kept = merged(kept, rows)
    if arguments.memory or (not arguments.case and name in WITH_MEMORY):
        kept = with_peaks(kept, shape, peaks(arguments, case))
        rows = [row for row in kept if row.name.endswith(f"; {shape}")]
    given = f"{arguments.rounds} rounds in turn"
    if not arguments.case:
        given = "rounds in turn: " + ", ".join(f"{n} of {each}" for each, n in ROUNDS.items())
    write_record(
        "generate",
        kept,
        command="python benchmarks/generate.py"
        + "".join(f" --case {each}" for each in arguments.case or ()),
        ratio_means="tokens a CPU second over those of stock `generate`, which is the limit",
        better="higher",
        conditions=f"{given}; peak memory is that of the whole process",
        packages=("torch", "transformers", "transformer-lens", "nnsight"),
        path=arguments.output,
    )
    print(f"{shape}, {arguments.threads} thread(s), {arguments.rounds} rounds")
    for row in rows:
        print(line_of(row), flush=True)


def line_of(row: Row) -> str:
    """One row as it is printed."""
    if row.ratio is None:
        return f"  {row.name} {row.peer}: {row.median:.1f} tokens/s; {row.note}"
    return (
        f"  {row.name} {row.peer:32s} {row.median:8.1f} tokens/s [{row.least:.1f}, {row.most:.1f}], "
        f"x{row.ratio:.3f} of stock in CPU time [{row.ratio_least:.3f}, {row.ratio_most:.3f}], {row.note}"
        + (f", {row.peak_memory:.0f} MiB" if row.peak_memory else "")
    )


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="repeat; default: all of the page"
    )
    parser.add_argument("--rounds", type=int, default=None, help="0: peak memory alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--memory", action="store_true", help="peak memory too, one process each")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "generate.json")
    arguments = parser.parse_args()
    if "stock" not in arguments.methods:
        parser.error("--methods must have stock, to which the others are compared")
    for name in arguments.case or ROUNDS:
        measure_case(name, arguments)


if __name__ == "__main__":
    main()
