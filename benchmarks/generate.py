"""Tokens per second under an edit of all heads, against stock ``generate`` and others' ways to the same edit.

One model of random weights, float32, greedy. The methods are asked in turn, round by round, in one
process; for peak memory each runs once more in a process of its own. A hook on the unembedding notes the
time of every forward pass: the first is the prompt's, the others are decoded tokens. Methods that make
the same edit must agree in their first logits and in every token before anything is reported.

    python benchmarks/generate.py --case short --rounds 5 --threads 1
    python benchmarks/generate.py --case long-batch --rounds 2 --methods stock "zerotuning score" nnsight
    python benchmarks/generate.py --case long --rounds 0 --memory

Rows that are measured again take the place of what the file has; the others stay, so that a case can be
measured in parts.
"""

import argparse
import copy
import dataclasses
import functools
import multiprocessing
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from record import OUT, Row, ratios, read_record, spread, write_record
from reference import eager_zerotuning

GAMMA = 2.0
WHOLE, THIRD = {"n_layer": 12, "vocab_size": 50257}, {"n_layer": 4, "vocab_size": 8192}
CASES: dict[str, dict[str, Any]] = {
    "short": {"model": WHOLE, "batch": 1, "n_pos": 64, "n_new": 16},
    "short-batch": {"model": WHOLE, "batch": 8, "n_pos": 64, "n_new": 8},
    "tiny": {"model": {"n_layer": 2, "vocab_size": 512}, "batch": 2, "n_pos": 8, "n_new": 4},
    "long": {"model": THIRD, "batch": 1, "n_pos": 1024, "n_new": 24},
    "long-batch": {"model": THIRD, "batch": 8, "n_pos": 1024, "n_new": 12},
}
"""GPT-2-small's width and heads; all its 12 layers, or 4 where a prompt of 1,024 tokens is long for a CPU:
work and overhead of an edit are both by layer."""
TOLERANCE = 1e-3
"""How far first logits of one edit may lie apart (they are about 10)."""


def build(case: dict[str, Any], attention: str) -> Any:
    """The case's model with one kind of attention; all share their weights."""
    base = base_model(**case["model"])
    twin = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    twin.set_attn_implementation(attention)
    return twin


@functools.cache
def base_model(n_layer: int, vocab_size: int) -> Any:
    """GPT-2-small's width, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": n_layer, "vocab_size": vocab_size, "n_positions": 2048}
    config = GPT2Config(**sizes, initializer_range=0.05, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


Run = Callable[[Any, int], Any]
"""(tokens [batch pos], how many new ones) -> tokens with the new ones."""


def workbench(case: dict[str, Any], edits: list[str]) -> tuple[Any, Run]:
    """Stock generate, or the workbench's edits on all heads."""
    import workbench as wb

    model = wb.wrap(build(case, "sdpa"))
    known = {
        "score": wb.ZeroTuning(GAMMA),
        "key": wb.ZeroTuning(1.2, mode="key"),
        "causal": wb.ACT(),
        "full": wb.ACT(mode="full"),
    }

    def run(tokens: Any, n_new: int) -> Any:
        with model.edit(*(known[name] for name in edits)):
            return model.generate(tokens, max_new_tokens=n_new, do_sample=False, eos_token_id=None)

    return model.model.lm_head, run


def eager(case: dict[str, Any]) -> tuple[Any, Run]:
    """Eager attention with an edited pattern, as research code has it."""
    import torch

    name = eager_zerotuning.register(GAMMA)
    model = build(case, "eager")
    model.set_attn_implementation(name)

    def run(tokens: Any, n_new: int) -> Any:
        mask = torch.ones_like(tokens)
        options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)

    return model.lm_head, run


def bridge(case: dict[str, Any]) -> tuple[Any, Run]:
    """A TransformerBridge whose pattern hooks edit; transformers' loop on its modules, as it has caches."""
    import torch

    from workbench.models.bridge_building import bridge_of

    made = bridge_of(build(case, "eager"))
    model = made.original_model

    def change(pattern: Any, hook: Any) -> Any:
        return eager_zerotuning.edited(pattern.clone(), GAMMA)

    hooks = [(f"blocks.{n}.attn.hook_pattern", change) for n in range(case["model"]["n_layer"])]

    def run(tokens: Any, n_new: int) -> Any:
        options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        with made.hooks(fwd_hooks=hooks):
            return model.generate(
                tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options
            )

    return model.lm_head, run


def nnsight(case: dict[str, Any]) -> tuple[Any, Run]:
    """Nnsight's own tracing: the attention function's pattern is edited and mixed again."""
    import torch
    from nnsight import NNsight

    hf = build(case, "eager")
    model = NNsight(hf)
    layers = range(case["model"]["n_layer"])

    def step(tokens: Any, cache: Any) -> Any:
        with model.trace(input_ids=tokens, past_key_values=cache, use_cache=True):
            for n in layers:
                call = model.transformer.h[n].attn.source.node("attention_interface_1")
                value = call.inputs[0][3]
                pattern = eager_zerotuning.edited(call.output[1].clone(), GAMMA)
                call.output = (torch.matmul(pattern, value).transpose(1, 2), pattern)
            output: Any = model.output.save()
        return output

    def run(tokens: Any, n_new: int) -> Any:
        # Its tracing has no cache-aware loop of its own: greedy, one trace a token.
        new, cache = tokens, None
        for _ in range(n_new):
            output = step(new, cache)
            cache = output.past_key_values
            new = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    return hf.lm_head, run


METHODS: dict[str, Callable[[dict[str, Any]], tuple[Any, Run]]] = {
    "stock": lambda case: workbench(case, []),
    "zerotuning score": lambda case: workbench(case, ["score"]),
    "zerotuning key": lambda case: workbench(case, ["key"]),
    "act causal": lambda case: workbench(case, ["causal"]),
    "act full": lambda case: workbench(case, ["full"]),
    "eager, edited pattern": eager,
    "TransformerBridge": bridge,
    "nnsight": nnsight,
}
WHY = {
    "zerotuning score": "; eager attention costs less than SDPA's call on short prompts, and nnsight's loop leaves "
    "out what generate does between tokens"
}
"""Where others may be ahead of ours, and of stock ``generate`` as well: why."""
SAME_EDIT = ("zerotuning score", "eager, edited pattern", "TransformerBridge", "nnsight")
PEERS = {"TransformerBridge": "transformer-lens", "nnsight": "nnsight"}


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
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


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
            rows.append(
                Row(
                    **identity(name, part, shape),
                    threads=threads,
                    unit="tokens / s",
                    **spread(speeds),
                    **cpu,
                    limit=1.0,
                    distance=1.0 / cpu["ratio"],
                    note=f"by wall time {wall['ratio']:.2f}" + WHY.get(name, ""),
                )
            )
    return rows


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


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=list(CASES), default="short")
    parser.add_argument("--rounds", type=int, default=3, help="0: peak memory alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--memory", action="store_true", help="peak memory too, one process each")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "generate.json")
    arguments = parser.parse_args()
    if "stock" not in arguments.methods:
        parser.error("--methods must have stock, to which the others are compared")
    case = CASES[arguments.case]
    shape = f"{case['model']['n_layer']} layers, T={case['n_pos']}, batch {case['batch']}, {case['n_new']} new"
    kept = read_record(arguments.output)["rows"] if arguments.output.is_file() else []
    rows = []
    if arguments.rounds:
        rounds = measure(arguments, case)
        agree(rounds)
        rows = rows_of(rounds, case, shape, arguments.threads)
    kept = merged(kept, rows)
    if arguments.memory:
        kept = with_peaks(kept, shape, peaks(arguments, case))
        rows = [row for row in kept if row.name.endswith(f"; {shape}")]
    write_record(
        "generate",
        kept,
        command=f"python benchmarks/generate.py --case {arguments.case}",
        ratio_means="tokens a CPU second over those of stock `generate`, which is the limit",
        better="higher",
        conditions=f"{arguments.rounds} rounds in turn; peak memory is that of the whole process",
        packages=("torch", "transformers", "transformer-lens", "nnsight"),
        path=arguments.output,
    )
    print(f"{shape}, {arguments.threads} thread(s), {arguments.rounds} rounds")
    for row in rows:
        print(
            f"  {row.name} {row.peer:32s} {row.median:8.1f} tokens/s [{row.least:.1f}, {row.most:.1f}], "
            f"x{row.ratio:.3f} of stock in CPU time [{row.ratio_least:.3f}, {row.ratio_most:.3f}], {row.note}"
            + (f", {row.peak_memory:.0f} MiB" if row.peak_memory else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
