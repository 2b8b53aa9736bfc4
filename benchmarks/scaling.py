"""How reading a model grows with prompt length, layers, heads and batch, beside a plain forward.

One size is varied, the others stay; each point is the median CPU time of some rounds, in which the
methods take turns. The exponent is the slope of log time on log size by least squares, over all points;
its residual is the root mean square in log time (0.05: points lie 5 % off the line). The memory is the
peak resident set of a run beyond what its process, one a point, had before it.

    python benchmarks/scaling.py --longest 16384
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import OURS, OUT, Row, ratios, versions_of, write_record
from resident import extra_mb

import workbench as wb
from workbench.attention.statistics import ColumnMean
from workbench.models.base import Site

EAGER_LONGEST = 4096
"""Beyond it, eager's maps of all layers take gigabytes."""

WHY = (
    "every tile of the pattern is written and read once, where the fused kernel keeps it in registers, "
    "and in this small model attention is nearly all there is"
)
"""Why reading costs more than a plain forward."""


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


def able(size: Size) -> list[str]:
    """Peers that can run this size."""
    return [peer for peer in PEERS if not peer.startswith("eager") or size.n_pos <= EAGER_LONGEST]


def measure(size: Size, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the rounds of each peer that can run this size."""
    works = {peer: PEERS[peer](size) for peer in able(size)}
    seconds: dict[str, list[float]] = {peer: [] for peer in works}
    with torch.no_grad():
        for work in works.values():
            work()
        for _ in range(rounds):
            for peer, work in works.items():
                start = time.process_time()
                work()
                seconds[peer].append(time.process_time() - start)
    return seconds


def peak_of(peer: str, size: Size, threads: int) -> float:
    """Peak memory in MB of one run, in a process that has done a small one."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        PEERS[peer](replace(size, n_pos=16))()
        work = PEERS[peer](size)
        return max(extra_mb(work), 0.1)


def peaks(size: Size, threads: int) -> dict[str, list[float]]:
    """Peak memory of each peer that can run this size, each in a process of its own.

    A fork of this one, which must not have run a model: what that leaves at hand would not be counted.
    """
    context, found = multiprocessing.get_context("fork"), {}
    for peer in able(size):
        with context.Pool(1) as pool:
            found[peer] = [pool.apply(peak_of, (peer, size, threads))]
    return found


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Exponent and residual of a straight line through the logarithms."""
    x, y = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    middle = statistics.mean(x), statistics.mean(y)
    over = sum((a - middle[0]) ** 2 for a in x)
    exponent = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True)) / over
    off = [b - middle[1] - exponent * (a - middle[0]) for a, b in zip(x, y, strict=True)]
    return exponent, math.sqrt(statistics.mean(value * value for value in off))


def row_of(axis: str, peer: str, shape: str, curves: dict[str, dict[float, list[float]]]) -> Row:
    """A fit over sizes; the ratio is that of the rounds at the largest size.

    Args:
        axis: What grows.
        peer: Whose row.
        shape: Of what stays.
        curves: What was measured, by peer and size.
    """
    is_ours = peer.startswith(OURS)
    points = [(size, statistics.median(values)) for size, values in curves[peer].items()]
    exponent, residual = slope(points)
    last, _ = slope(points[-2:])
    largest = points[-1][0]
    sizes = ", ".join(f"{x:g}: {y:.3g}" for x, y in points)
    return Row(
        name=axis,
        peer=peer,
        version=None if is_ours else versions_of("transformers")["transformers"],
        shape=shape,
        threads=torch.get_num_threads(),
        median=exponent,
        unit="exponent",
        **ratios(curves[peer][largest], curves[next(iter(PEERS))][largest]),
        note=f"residual {residual:.2f}, last step {last:.2f}; {sizes}",
        why=WHY if is_ours else "",
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
    memory = {size: peaks(size, arguments.threads) for sizes in axes.values() for size in sizes}
    print("memory: measured", flush=True)
    for axis, sizes in axes.items():
        seconds = {size: measure(size, arguments.rounds) for size in sizes}
        fixed = ", ".join(
            f"{key} {value}" for key, value in asdict(sizes[0]).items() if key != axis
        )
        for what, found in (("", seconds), (", peak memory in MB", memory)):
            curves = {
                peer: {
                    float(getattr(size, axis)): each[peer]
                    for size in sizes
                    if peer in (each := found[size])
                }
                for peer in PEERS
            }
            for peer in PEERS:
                rows.append(row_of(axis + what, peer, fixed, curves))
                print(
                    f"{axis + what:28s} {peer:34s} {rows[-1].median:.2f}  {rows[-1].note}",
                    flush=True,
                )
    write_record(
        "scaling",
        rows,
        command=f"python benchmarks/scaling.py --longest {arguments.longest}",
        ratio_means="CPU time (or peak memory) at the largest size, over the plain forward's",
        conditions=f"medians of {arguments.rounds} rounds of CPU time, methods in turn in one process; "
        "memory of one run in a process of its own",
        packages=("torch", "transformers"),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
