"""Small cells to run, and how long they took: what the benchmarks of sweeps share."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import Row, spread

TINY = {"vocab_size": 257, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2} | {
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Table:
    """Rows of the report."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self, name: str, shape: str, values: list[float], unit: str, who: str = "", **more: Any
    ) -> None:
        """Add the median of some values, and say it; ``who``: which of our ways it is."""
        measured = spread(values) if len(values) > 1 else {"median": values[0]}
        peer = f"workbench, {who}" if who else "workbench"
        row = Row(name=name, peer=peer, shape=shape, threads=1, unit=unit, **measured, **more)
        self.rows.append(row)
        ends = "" if len(values) == 1 else f" [{row.least:.4g}, {row.most:.4g}]"
        ratio = "" if row.ratio is None else f", ratio {row.ratio:.3g}"
        note = f"  ({row.note})" if row.note else ""
        print(
            f"{name:34s} {shape:14s} {who} {row.median:.4g}{ends} {unit}{ratio}{note}", flush=True
        )


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds of a block, its ended children counted."""
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu()
    yield found
    found["wall"], found["cpu"] = time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def tiny_model(folder: Path) -> str:
    """A GPT-2 of two layers, without a tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**TINY)).save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def plan_of(model: str, n_cells: int, hashes: Path | None = None, **changes: Any) -> Any:
    """A plan of one cheap probe, a cell a seed."""
    from workbench.execute.plan import make_plan

    document = {
        "models": [model],
        "probes": {"attention-sinks": {"inputs": "random"}},
        "data": "random",
        "limit": 2,
        "n_pos": 16,
        "seeds": list(range(n_cells)),
    }
    return make_plan({**document, **changes}, hashes)
