"""Sinks, value norms and residual norms of a whole model: what it costs, against what others cost.

Every method runs in a process of its own, on a GPT-2-small shape with random weights. For the
times a coordinator asks the processes in turn (interleaved rounds, so that drift of the machine
hits all alike) and reports medians and spread of the ratio to plain SDPA, of wall time and of the
process's CPU time (which a busy machine disturbs less); for the memory it reads each process's own
peak resident set during its first run, beyond what it had with the model loaded.

    python benchmarks/capture.py --lengths 256 1024 4096 --rounds 5
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "out" / "capture.json"
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
    from workbench.models.transformer_lens import build_bridge

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


METHODS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "plain SDPA forward": lambda: plain("sdpa"),
    "plain SDPA forward, no unembedding": without_head,
    "workbench: sinks + value norms + residual norms": lambda: workbench_capture(with_logits=False),
    "the same, unembedding included": lambda: workbench_capture(with_logits=True),
    "eager, output_attentions": lambda: plain("eager"),
    "TransformerBridge, patterns only": lambda: bridge(patterns_only=True),
    "TransformerBridge, full cache": lambda: bridge(patterns_only=False),
    "nnsight, attention + residual": nnsight_trace,
}


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
    except Exception as error:  # a peer that fails is a row of the table
        pipe.send({"error": f"{type(error).__name__}: {error}"[:200]})


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


def summarise(rows: dict[str, Any], reference: str) -> None:
    """Add medians and the ratio to the reference, round by round."""
    base, base_cpu = rows[reference]["seconds"], rows[reference]["cpu"]
    for row in rows.values():
        if "error" in row:
            continue
        ratios = [a / b for a, b in zip(row["seconds"], base, strict=True)]
        row["median_s"] = statistics.median(row["seconds"])
        row["ratio"] = statistics.median(ratios)
        pairs = zip(row["cpu"], base_cpu, strict=True)
        row["cpu_ratio"] = statistics.median(a / b for a, b in pairs)
        row["ratio_min"], row["ratio_max"] = min(ratios), max(ratios)
        row["memory_ratio"] = row["extra_mb"] / rows[reference]["extra_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "transformer-lens", "nnsight")
    report: dict[str, Any] = {
        "shape": SHAPE,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "versions": {name: version(name) for name in packages},
        "lengths": {},
    }
    for n_pos in arguments.lengths:
        rows = measure(n_pos, arguments.rounds, arguments.threads, arguments.methods)
        summarise(rows, arguments.methods[0])
        report["lengths"][n_pos] = rows
        print(f"\nT = {n_pos}")
        for name, row in rows.items():
            if "error" in row:
                print(f"  {name:50s} failed: {row['error']}")
                continue
            spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
            print(
                f"  {name:50s} {row['median_s']:7.2f} s  x{row['ratio']:.2f} ({spread}), CPU x{row['cpu_ratio']:.2f}  "
                f"+{row['extra_mb']:.0f} MB (x{row['memory_ratio']:.2f})",
                flush=True,
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
