"""How reading a model grows with prompt length, layers, heads and batch, beside a plain forward.

One size is varied, the others stay; each point is the median CPU time of some rounds, in which the
methods take turns. The exponent is the slope of log time on log size by least squares, over all points;
its residual is the root mean square in log time (0.05: points lie 5 % off the line). The memory is the
peak resident set of a run beyond what the process had before it.

    python benchmarks/scaling.py --longest 16384
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import OUT, Row, versions_of, write_record
from resident import forget_peak, memory_mb

import workbench as wb
from workbench.attention.statistics import ColumnMean
from workbench.models.base import Site

EAGER_LONGEST = 4096
"""Beyond it, eager's maps of all layers take gigabytes."""

WHY = (
    "every tile of the pattern is written and read once, where the fused kernel keeps it in registers, "
    "and in this small model attention is nearly all there is"
)
"""Why reading grows faster than a plain forward."""
LEAST_MB = 8.0
"""Less is what the allocator happens to have at hand."""


@dataclass(frozen=True)
class Size:
    """A small GPT-2 and its prompts."""

    n_pos: int = 512
    n_layers: int = 2
    n_heads: int = 4
    batch: int = 1
    d_model: int = 128

    def build(self, attention: str) -> Any:
        """A model with random weights; its vocabulary is small so that the blocks are what counts."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=self.n_layers,
            n_head=self.n_heads,
            n_embd=self.d_model,
            n_positions=self.n_pos,
            vocab_size=128,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(config).eval()

    def tokens(self) -> Any:
        """Random ids."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(128, (self.batch, self.n_pos), generator=generator)


def plain(size: Size, attention: str) -> Callable[[], Any]:
    model, tokens = size.build(attention), size.tokens()
    options = {"output_attentions": True} if attention == "eager" else {}
    return lambda: model(tokens, use_cache=False, **options)


def reading(size: Size) -> Callable[[], Any]:
    model, tokens = wb.wrap(size.build("sdpa")), size.tokens()
    sites = [Site(name, layer) for layer in range(size.n_layers) for name in ("pattern", "v")]
    reduce = {"pattern": ColumnMean(), "v": lambda value: value.norm(dim=-1)}
    return lambda: model.capture(tokens, sites, reduce)


PEERS: dict[str, Callable[[Size], Callable[[], Any]]] = {
    "plain SDPA forward": lambda size: plain(size, "sdpa"),
    "workbench: sinks + value norms": reading,
    "eager, output_attentions": lambda size: plain(size, "eager"),
}


def measure(size: Size, rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU seconds and peak memory in MB of each peer that can run this size."""
    works = {
        peer: build(size)
        for peer, build in PEERS.items()
        if not (peer.startswith("eager") and size.n_pos > EAGER_LONGEST)
    }
    seconds: dict[str, list[float]] = {peer: [] for peer in works}
    memory: dict[str, float] = {}
    with torch.no_grad():
        for peer, work in works.items():
            before = memory_mb("VmRSS")
            forget_peak()
            work()
            memory[peer] = max(memory_mb("VmHWM") - before, 0.0)
        for _ in range(rounds):
            for peer, work in works.items():
                start = time.process_time()
                work()
                seconds[peer].append(time.process_time() - start)
    return {peer: (statistics.median(seconds[peer]), memory[peer]) for peer in works}


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Exponent and residual of a straight line through the logarithms."""
    x, y = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    middle = statistics.mean(x), statistics.mean(y)
    over = sum((a - middle[0]) ** 2 for a in x)
    exponent = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True)) / over
    off = [b - middle[1] - exponent * (a - middle[0]) for a, b in zip(x, y, strict=True)]
    return exponent, math.sqrt(statistics.mean(value * value for value in off))


def row_of(
    axis: str,
    peer: str,
    shape: str,
    points: list[tuple[float, float]],
    plain: list[tuple[float, float]],
) -> Row:
    """A fit over sizes; the ratio is taken at the largest size."""
    exponent, residual = slope(points)
    last, _ = slope(points[-2:])
    sizes = ", ".join(f"{x:g}: {y:.3g}" for x, y in points)
    why = f"{WHY}; " if axis == "n_pos" and peer.startswith("workbench") else ""
    return Row(
        name=axis,
        peer=peer,
        version=versions_of("transformers")["transformers"],
        shape=shape,
        threads=torch.get_num_threads(),
        median=exponent,
        unit="exponent",
        ratio=points[-1][1] / dict(plain)[points[-1][0]],
        note=f"{why}residual {residual:.2f}, last step {last:.2f}; {sizes}",
        points=points,
    )


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "scaling.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [
        length for length in (256 << power for power in range(10)) if length <= arguments.longest
    ]
    axes: dict[str, list[Size]] = {
        "n_pos": [Size(n_pos=length) for length in lengths],
        "n_layers": [Size(n_layers=layers) for layers in (1, 2, 4, 8, 16)],
        "n_heads": [Size(n_heads=heads) for heads in (2, 4, 8, 16, 32)],
        "batch": [Size(batch=batch, n_pos=256) for batch in (1, 2, 4, 8, 16)],
    }
    rows: list[Row] = []
    for axis, sizes in axes.items():
        found = {}
        for size in sizes:
            found[getattr(size, axis)] = measure(size, arguments.rounds)
            print(f"{axis} = {getattr(size, axis)}", flush=True)
        fixed = ", ".join(
            f"{key} {value}" for key, value in asdict(replace(sizes[0])).items() if key != axis
        )
        for kind, what in enumerate(("", ", peak memory in MB")):
            curves = {
                peer: [(float(x), each[peer][kind]) for x, each in found.items() if peer in each]
                for peer in PEERS
            }
            for peer, points in curves.items():
                if kind:
                    points = [point for point in points if point[1] >= LEAST_MB]
                if kind and (axis != "n_pos" or len(points) < 3):
                    continue  # memory only where it is the question, and could be measured
                rows.append(row_of(axis + what, peer, fixed, points, curves[next(iter(PEERS))]))
                print(f"  {axis + what:16s} {peer:34s} {rows[-1].median:.2f}  {rows[-1].note}")
    write_record(
        "scaling",
        rows,
        command=f"python benchmarks/scaling.py --longest {arguments.longest}",
        ratio_means="CPU time (or peak memory) at the largest size, over the plain forward's",
        conditions=f"medians of {arguments.rounds} rounds of CPU time, methods in turn in one process",
        packages=("torch", "transformers"),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
