"""Sinks, value norms and residual norms of a whole model: what it costs, against what others cost.

Every method runs in a process of its own, on a GPT-2-small shape with random weights. For the
times a coordinator asks the processes in turn (interleaved rounds, so that drift of the machine
hits all alike) and reports medians and spread of the ratio to plain SDPA, of wall time and of the
process's CPU time (which a busy machine disturbs less); for the memory it reads each process's own
peak resident set during its first run, beyond what it had with the model loaded.

    python benchmarks/capture.py --lengths 256 1024 4096 --rounds 5
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from record import OUT, Row, ratios, spread, versions_of, write_record

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "interp-engine")
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 4096, "vocab_size": 50257}


def build(attention: str) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, attn_implementation=attention)
    return GPT2LMHeadModel(config).eval()


def plain(attention: str) -> Callable[[Any], Any]:
    model = build(attention)
    options = {"output_attentions": True} if attention == "eager" else {}
    return lambda tokens: model(tokens, use_cache=False, **options)


def without_head() -> Callable[[Any], Any]:
    model = build("sdpa")
    return lambda tokens: model.transformer(tokens, use_cache=False)


def workbench_capture(*, with_logits: bool) -> Callable[[Any], Any]:
    import torch

    import workbench as wb
    from workbench.attention.statistics import ColumnMean
    from workbench.models.base import Site

    model = wb.wrap(build("sdpa"))
    if with_logits:  # the same work as a plain forward, unembedding included

        def unembed(module: Any, args: Any, output: Any) -> None:
            model.model.lm_head(output.last_hidden_state)

        model.model.transformer.register_forward_hook(unembed)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.norm(dim=-1)

    layers = range(SHAPE["n_layer"])
    sites = [Site("resid_pre", 0)]
    sites += [Site(name, layer) for layer in layers for name in ("pattern", "v", "resid_post")]
    reduce = {"pattern": ColumnMean(), "v": norm, "resid_pre": norm, "resid_post": norm}
    return lambda tokens: model.capture(tokens, sites, reduce)


def bridge(*, patterns_only: bool) -> Callable[[Any], Any]:
    from workbench.models.bridge_building import build_bridge

    model = build_bridge(build("eager"), None)  # the plain bridge, without asking the hub
    if patterns_only:
        return lambda tokens: model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_pattern")
        )
    return lambda tokens: model.run_with_cache(tokens)


def nnsight_trace() -> Callable[[Any], Any]:
    from nnsight import NNsight

    model = NNsight(build("eager"))

    def run(tokens: Any) -> Any:
        saved: list[Any] = []
        with model.trace(tokens, use_cache=False, output_attentions=True):
            for block in model.transformer.h:
                saved.append(block.attn.output[1].save())
                saved.append(block.output.save())
        return saved

    return run


def interp_engine_capture() -> Callable[[Any], Any]:
    """Its eager backend; the package is no dependency of ours (pip install --no-deps interp-engine)."""
    from interp_engine.capture import capture
    from interp_engine.model import EagerModel

    # A tokenizer is asked for and not used: ids go in.
    given: Any = {"hf_model": build("eager"), "tokenizer": object(), "device": "cpu"}
    model = EagerModel("gpt2", attn_implementation="eager", **given)
    names = ("attn_probs", "value", "resid_post")
    points = [f"{name}.{layer}" for layer in range(SHAPE["n_layer"]) for name in names]
    return lambda tokens: capture(model, tokens, ["resid_pre.0", *points])


METHODS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "plain SDPA forward": lambda: plain("sdpa"),
    "plain SDPA forward, no unembedding": without_head,
    "workbench: sinks + value norms + residual norms": lambda: workbench_capture(with_logits=False),
    "workbench, unembedding included": lambda: workbench_capture(with_logits=True),
    "eager, output_attentions": lambda: plain("eager"),
    "TransformerBridge, patterns only": lambda: bridge(patterns_only=True),
    "TransformerBridge, full cache": lambda: bridge(patterns_only=False),
    "nnsight, attention + residual": nnsight_trace,
    "interp-engine (eager), attention + values + residual": interp_engine_capture,
}


WITHOUT_HEAD = {
    "plain SDPA forward, no unembedding",
    "workbench: sinks + value norms + residual norms",
}
"""These do less work than the others and are compared with each other."""
PEERS = {
    "TransformerBridge, patterns only": "transformer-lens",
    "TransformerBridge, full cache": "transformer-lens",
    "nnsight, attention + residual": "nnsight",
    "interp-engine (eager), attention + values + residual": "interp-engine",
}
"""Which package a method is; the others are transformers' own model."""


def memory_mb(field: str) -> float:
    """A field of this process's status (Linux), in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def forget_peak() -> None:
    """Let the peak resident set begin anew: building a model has peaks of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(name: str, n_pos: int, threads: int, pipe: Connection) -> None:
    """Run one method whenever the coordinator asks; answer with seconds and peak memory."""
    import torch

    torch.set_num_threads(threads)
    try:
        run = METHODS[name]()
        tokens = torch.randint(
            SHAPE["vocab_size"], (1, n_pos), generator=torch.Generator().manual_seed(1)
        )
        before = memory_mb("VmRSS")
        with torch.no_grad():
            forget_peak()
            kept = run(tokens)
            extra = memory_mb("VmHWM") - before
            del kept
            pipe.send({"extra_mb": extra})
            while pipe.recv() == "run":
                start, cpu = time.perf_counter(), time.process_time()
                kept = run(tokens)
                taken = time.perf_counter() - start, time.process_time() - cpu
                del kept
                pipe.send({"seconds": taken[0], "cpu": taken[1]})
    except ModuleNotFoundError as error:
        pipe.send({"error": f"{error.name} is not installed"})
    except Exception as error:  # a peer that fails is a row of the table
        pipe.send({"error": f"{type(error).__name__}: {error}"[:200]})


def measure_here(n_pos: int, rounds: int, threads: int, names: list[str]) -> dict[str, Any]:
    """The same in this process, which starts every library once; without memory."""
    import torch

    torch.set_num_threads(threads)
    size, generator = (1, n_pos), torch.Generator().manual_seed(1)
    tokens = torch.randint(SHAPE["vocab_size"], size, generator=generator)
    rows: dict[str, Any] = {}
    works: dict[str, Callable[[Any], Any]] = {}
    with torch.no_grad():
        for name in names:
            try:
                works[name] = METHODS[name]()
                works[name](tokens)
                rows[name] = {"seconds": [], "cpu": []}
            except ModuleNotFoundError as error:
                works.pop(name, None)
                rows[name] = {"error": f"{error.name} is not installed"}
        for _ in range(rounds):
            for name, work in works.items():
                start, cpu = time.perf_counter(), time.process_time()
                kept = work(tokens)
                rows[name]["cpu"].append(time.process_time() - cpu)
                rows[name]["seconds"].append(time.perf_counter() - start)
                del kept
    return rows


def measure(n_pos: int, rounds: int, threads: int, names: list[str]) -> dict[str, Any]:
    """Interleaved rounds over all methods at one length."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    rows: dict[str, Any] = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, n_pos, threads, theirs), daemon=True)
        process.start()
        answer = ours.recv()
        if "error" in answer:
            rows[name] = answer
        else:
            workers[name] = (process, ours)
            rows[name] = {"seconds": [], "cpu": [], **answer}
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


def rows_of(n_pos: int, found: dict[str, Any], threads: int, reference: str) -> list[Row]:
    """The methods at one length against the reference, round by round."""
    base = found[reference]
    plain = {
        name: found.get(f"plain SDPA forward{name}", base) for name in ("", ", no unembedding")
    }
    versions, rows = versions_of(*PACKAGES), []
    for peer, each in found.items():
        about = {
            "name": f"T = {n_pos}" + (", no unembedding" if peer in WITHOUT_HEAD else ""),
            "peer": peer,
            "version": None
            if peer.startswith("workbench")
            else versions[PEERS.get(peer, "transformers")],
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
        rows.append(
            Row(
                **about,
                unit="s",
                **spread(each["seconds"]),
                **ratio,
                cpu_ratio=cpu_ratio,
                peak_memory=each.get("extra_mb"),
                limit=limit,
                distance=statistics.median(each["seconds"]) / limit,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("-o", "--output", type=Path, default=OUT / "capture.json")
    parser.add_argument(
        "--small", action="store_true", help="4 layers, 2,048 words, all in one process, no memory"
    )
    arguments = parser.parse_args()
    if arguments.small:
        SHAPE.update(n_layer=4, vocab_size=2048)
    measured = measure_here if arguments.small else measure
    rows: list[Row] = []
    for n_pos in arguments.lengths:
        found = measured(n_pos, arguments.rounds, arguments.threads, arguments.methods)
        rows += rows_of(n_pos, found, arguments.threads, arguments.methods[0])
        print(f"\nT = {n_pos}")
        for row in rows[-len(found) :]:
            if row.median is None:
                print(f"  {row.peer:50s} {row.note}")
                continue
            print(
                f"  {row.peer:50s} {row.median:7.2f} s  x{row.ratio:.2f} ({row.ratio_least:.2f}-"
                f"{row.ratio_most:.2f}), CPU x{row.cpu_ratio:.2f}"
                + (f"  +{row.peak_memory:.0f} MB" if row.peak_memory else ""),
                flush=True,
            )
    write_record(
        "capture",
        rows,
        command="python benchmarks/capture.py --lengths "
        + " ".join(map(str, arguments.lengths))
        + " --small" * arguments.small,
        ratio_means="wall time over that of a plain SDPA forward of the same length",
        conditions=f"{arguments.rounds} interleaved rounds"
        + ("" if arguments.small else ", a process a method"),
        packages=PACKAGES,
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
