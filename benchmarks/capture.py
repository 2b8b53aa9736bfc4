"""Sinks, value norms and residual norms of a whole model: what it costs, against what others cost.

Every method runs in a process of its own, on a GPT-2-small shape with random weights. For the
times a coordinator asks the processes in turn (interleaved rounds, so that drift of the machine
hits all alike) and reports medians and spread of the ratio to plain SDPA, of wall time and of the
process's CPU time (which a busy machine disturbs less); for the memory it reads each process's own
peak resident set during its first run, beyond what it had with the model loaded.

    python benchmarks/capture.py --lengths 256 1024 4096 --rounds 5

Long prompts have fewer rounds, two at least: as many tokens as the rounds have at 1,024.
"""

import argparse
import statistics
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import turns
from capture_methods import LONGEST_OF_MAPS, METHODS, PEERS, SHAPE, WITHOUT_HEAD
from peaks import Decoder, limits
from record import OURS, OUT, Row, ratios, spread, versions_of, write_record
from resident import forget_peak, memory_mb

WHY = (
    "a tiled softmax takes the place of the fused kernel: 1.2-1.5 times its CPU time, since every tile of the "
    "pattern is written and read once"
)
"""Why reading costs more than a plain forward."""
PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "interp-engine")


def serve(name: str, n_pos: int, threads: int, pipe: Connection) -> None:
    """Run one method whenever it is asked; says its peak memory once."""
    import torch

    def build() -> turns.Built:
        torch.set_num_threads(threads)
        run = METHODS[name]()
        tokens = torch.randint(
            SHAPE["vocab_size"], (1, n_pos), generator=torch.Generator().manual_seed(1)
        )
        before = memory_mb("VmRSS")
        forget_peak()
        kept = run(tokens)
        extra = memory_mb("VmHWM") - before
        del kept
        return {"extra_mb": extra}, lambda: run(tokens), turns.nothing

    with torch.no_grad():
        turns.serve(pipe, build)


def measure(n_pos: int, rounds: int, threads: int, names: list[str]) -> dict[str, Any]:
    """Interleaved rounds over all methods at one length."""
    too_long = {name for name in names if n_pos > LONGEST_OF_MAPS and name in PEERS}
    tasks = {name: (name, n_pos, threads) for name in names if name not in too_long}
    found = turns.in_turn(serve, tasks, rounds)
    gigabytes = SHAPE["n_layer"] * SHAPE["n_head"] * n_pos**2 * 4 / 1e9
    why = {"error": f"keeps the {gigabytes:.1f} GB of patterns that eager keeps"}
    return {name: why if name in too_long else found[name] for name in names}


def rounds_at(n_pos: int, rounds: int) -> int:
    """Rounds at a length."""
    return max(min(2, rounds), min(rounds, rounds * 1024 // n_pos))


def rows_of(n_pos: int, found: dict[str, Any], threads: int, reference: str) -> list[Row]:
    """The methods at one length against the reference, round by round."""
    base = found[reference]
    plain = {
        name: found.get(f"plain SDPA forward{name}", base) for name in ("", ", no unembedding")
    }
    versions, rows = versions_of(*PACKAGES), []
    for peer, each in found.items():
        is_ours = peer.startswith(OURS)
        about = {
            "name": f"T = {n_pos}" + (", no unembedding" if peer in WITHOUT_HEAD else ""),
            "peer": peer,
            "version": None if is_ours else versions[PEERS.get(peer, "transformers")],
            "shape": f"GPT-2 small, {SHAPE['n_layer']} layers, {SHAPE['vocab_size']:,} words, batch 1",
            "threads": threads,
        }
        if "error" in each:
            rows.append(Row(**about, note=f"not measured: {each['error']}"))
            continue
        ratio = ratios(each["seconds"], base["seconds"])
        cpu_ratio = ratios(each["cpu"], base["cpu"])["ratio"]
        least_work = plain[", no unembedding" if peer in WITHOUT_HEAD else ""]
        limit = statistics.median(least_work["seconds"])
        distance = statistics.median(each["seconds"]) / limit
        rows.append(
            Row(
                **about,
                unit="s",
                **spread(each["seconds"]),
                **ratio,
                cpu_ratio=cpu_ratio,
                peak_memory=each.get("extra_mb"),
                limit=limit,
                distance=distance,
                why=WHY if is_ours else "",
            )
        )
    return rows


def limit_rows(n_pos: int, found: dict[str, Any], threads: int, reference: str) -> list[Row]:
    """What a plain forward takes at least on this machine, by arithmetic and by bandwidth."""
    import torch

    torch.set_num_threads(threads)
    decoder = Decoder.gpt2(SHAPE)
    flops, n_bytes = decoder.flops(n_pos, unembed=True), decoder.n_bytes(unembed=True)
    plain = statistics.median(found[reference]["seconds"])
    return [
        Row(
            name=f"T = {n_pos}",
            peer=f"least by {kind}",
            threads=threads,
            shape=f"GPT-2 small, {SHAPE['n_layer']} layers, {SHAPE['vocab_size']:,} words, batch 1",
            median=seconds,
            unit="s",
            note=f"{how}; the plain forward takes {plain / seconds:.3g} times it",
        )
        for kind, (seconds, how) in limits(flops, n_bytes).items()
    ]


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("-o", "--output", type=Path, default=OUT / "capture.json")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for n_pos in arguments.lengths:
        rounds = rounds_at(n_pos, arguments.rounds)
        found = measure(n_pos, rounds, arguments.threads, arguments.methods)
        new = rows_of(n_pos, found, arguments.threads, arguments.methods[0])
        new += limit_rows(n_pos, found, arguments.threads, arguments.methods[0])
        rows += new
        print(f"\nT = {n_pos}, {rounds} rounds")
        for row in new:
            if row.ratio is None:
                print(f"  {row.peer:50s} {row.note}")
                continue
            print(
                f"  {row.peer:50s} {row.median:7.2f} s  x{row.ratio:.2f} ({row.ratio_least:.2f}-"
                f"{row.ratio_most:.2f}), CPU x{row.cpu_ratio:.2f}"
                + (f"  +{row.peak_memory:.0f} MB" if row.peak_memory else ""),
                flush=True,
            )
    lengths = " ".join(map(str, arguments.lengths))
    each = ", ".join(f"{rounds_at(n, arguments.rounds)} at {n:,}" for n in arguments.lengths)
    write_record(
        "capture",
        rows,
        command=f"python benchmarks/capture.py --lengths {lengths} --rounds {arguments.rounds}",
        ratio_means="wall time over that of a plain SDPA forward of the same length",
        conditions=f"interleaved rounds, a process a method: {each} of them",
        packages=PACKAGES,
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
