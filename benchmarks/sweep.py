"""What a sweep costs besides its measurements, and how that grows.

    python benchmarks/sweep.py overhead workers ray plan store [--most 10000] [-o FILE]

overhead   a cell beyond its measurement: the smallest model, a probe that takes milliseconds
workers    one worker against two, the same cells of the demo model
ray        actors on one node against processes, the same cells
plan       expanding a plan, asking the store, and estimating, at 1e2 ... ``--most`` cells
store      put, list, get and the size on disk at 1e3 ... ``--most`` results

Wall and CPU seconds (of the workers too). The store is filled with copies of one small result;
published as a sweep publishes them, flushed to the disk up to 10,000; more are only there to be read.
"""

import argparse
import contextlib
import hashlib
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import OUT, Row, ratios, spread, write_record

FLUSHED = 10_000
RATIO_MEANS = "how many times faster than the first way of the same cells"
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


# Overhead of a cell


def overhead(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """Seconds of a cell in a warm worker, beyond the measurement its result tells."""
    from workbench.execute.local import LocalExecutor
    from workbench.execute.sweep import run_plan
    from workbench.store.results import Store

    model = tiny_model(folder)
    store = Store(folder / "overhead", report=lambda message: None)
    plan = plan_of(model, 40, store.path / "hashes")
    summary = run_plan(plan, store, LocalExecutor(1))
    warm = [one for one in summary.outcomes if one.load_seconds == 0]
    measured = [store.get(one.result).provenance["seconds"] for one in warm]
    beyond = [1e3 * (one.seconds - own) for one, own in zip(warm, measured, strict=True)]
    table.add("measurement of a cell", "40 cells", [1e3 * each for each in measured], "ms")
    table.add("cell beyond its measurement", "40 cells", beyond, "ms")
    again = run_plan(plan, store, LocalExecutor(1))
    table.add("a cell that the store holds", "40 cells", [1e3 * again.seconds / 40], "ms")
    _overhead_here(table, folder, plan)


def _overhead_here(table: Table, folder: Path, plan: Any) -> None:
    """The same cells in this process, in turn with the bare measurement: CPU time is steadier."""
    import workbench as wb
    from workbench.execute.cell import LoadedModel, run_cell
    from workbench.store.results import Store

    store, loaded = Store(folder / "here", report=lambda message: None), LoadedModel()
    whole, bare = [], []
    for cell in plan.cells:
        with clocks() as ran:
            run_cell(cell, store, loaded)
        with clocks() as measured:
            wb.run(cell.probe, loaded.model, cell.data, **cell.options, **cell.settings)
        whole.append(1e3 * ran["cpu"])
        bare.append(1e3 * measured["cpu"])
    table.add("run without a store", "40 cells", bare[1:], "CPU ms")
    table.add("cell of a sweep", "40 cells", whole[1:], "CPU ms")


# Workers


def workers(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """The same cells on one worker and on two, in turn."""
    from workbench.execute.local import LocalExecutor

    shape = f"{arguments.cells} cells"
    times: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for turn in range(arguments.rounds):
        for n_workers in (1, 2):
            executor = LocalExecutor(n_workers, n_threads=1)
            times[n_workers].append(_sweep(folder / f"w{turn}-{n_workers}", executor, arguments))
    _compare(table, "one worker", "two workers", shape, times[1], times[2])


def ray(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """The same cells on actors of a node of two cores, and on processes, two of each."""
    import ray as library

    from workbench.execute.local import LocalExecutor
    from workbench.execute.ray import RayExecutor

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    shape = f"{arguments.cells} cells"
    try:
        library.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    except Exception as error:  # Ray raises no class of its own where its node does not start
        note = f"not measured: {' '.join(str(error).split())[:200]}"
        print(note, file=sys.stderr)
        table.rows.append(
            Row(name="whole sweep", peer="workbench, two Ray actors", shape=shape, note=note)
        )
        return
    local, actors = [], []
    for turn in range(arguments.rounds):
        local.append(_sweep(folder / f"l{turn}", LocalExecutor(2, n_threads=1), arguments))
        actors.append(_sweep(folder / f"r{turn}", RayExecutor(2), arguments))
    library.shutdown()
    _compare(table, "two processes", "two Ray actors", shape, local, actors, cpu=False)


def _sweep(path: Path, executor: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Clocks of one sweep in an empty store, and from the first result to the last."""
    from workbench.execute.cell import Outcome
    from workbench.execute.sweep import run_plan
    from workbench.store.results import Store

    store, ended = Store(path, report=lambda message: None), []
    about = {"limit": 100, "n_pos": 64, "batch_size": 10}
    plan = plan_of("demo", arguments.cells, store.path / "hashes", **about)
    with clocks() as found:
        summary = run_plan(
            plan,
            store,
            executor,
            lambda event: ended.append(time.perf_counter()) if isinstance(event, Outcome) else None,
        )
    assert summary.count("computed") == arguments.cells
    # Without the start: what a long sweep tends to.
    found["steady"] = (ended[-1] - ended[0]) / (arguments.cells - 1)
    shutil.rmtree(path)
    return found


def _compare(
    table: Table,
    base: str,
    other: str,
    shape: str,
    before: list[dict[str, float]],
    after: list[dict[str, float]],
    *,
    cpu: bool = True,
) -> None:
    """Rows of two ways of running the same cells; ratio: how many times faster the second is."""
    kinds = {"wall": ("whole sweep", "s"), "steady": ("first result to last", "s a cell")}
    if cpu:
        kinds["cpu"] = ("whole sweep, CPU", "CPU s")
    for kind, (name, unit) in kinds.items():
        first, second = ([each[kind] for each in times] for times in (before, after))
        table.add(name, shape, first, unit, base)
        table.add(name, shape, second, unit, other, **ratios(first, second))


# Plans


def plan(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """Seconds and memory of what happens before the first cell starts."""
    from workbench.execute.estimate import Estimator
    from workbench.execute.schedule import Schedule
    from workbench.execute.sweep import cached_results
    from workbench.store.results import Store
    from workbench.store.strict_json import to_json

    model = tiny_model(folder)
    store = Store(folder / "plan", report=lambda message: None)
    plan_of(model, 1, store.path / "hashes")
    for n_cells in _sizes(100, arguments.most):
        before, shape = _resident(), f"{n_cells} cells"
        with clocks() as made:
            found = plan_of(model, n_cells, store.path / "hashes")
        memory = _resident() - before
        with clocks() as asked:
            cached_results(found, store)
        with clocks() as estimated:
            estimator = Estimator(store, found.inputs)
            for cell in found.cells:
                estimator.estimate(cell)
        with clocks() as scheduled:
            schedule = Schedule(found.cells)
            while schedule.take("worker") is not None:
                pass
        size = len(to_json([cell.document() for cell in found.cells]))
        for name, clock in (
            ("expanding a plan", made),
            ("asking the store", asked),
            ("estimating", estimated),
            ("handing out", scheduled),
        ):
            table.add(name, shape, [1e6 * clock["cpu"] / n_cells], "CPU us a cell")
        table.add("memory of a plan", shape, [memory / n_cells], "bytes a cell")
        table.add("plan.json", shape, [size / n_cells], "bytes a cell")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sizes(first: int, most: int) -> list[int]:
    found = [first]
    while 10 * found[-1] <= most:
        found.append(10 * found[-1])
    return found


# The store


def store(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """Put, list and get, and what is on the disk, as a store grows."""
    from workbench.store.results import Store

    opened = Store(folder / "store", report=lambda message: None)
    copy, n_held = _copies(folder), 0
    for size in _sizes(1000, arguments.most):
        flushed = size <= FLUSHED
        with clocks() as put, contextlib.nullcontext() if flushed else _unflushed():
            for number in range(n_held, size):
                opened.publish(copy(number))
        shape = f"{size} results"
        if flushed:
            table.add("put", shape, [1e3 * put["wall"] / (size - n_held)], "ms")
            table.add("put", shape, [1e3 * put["cpu"] / (size - n_held)], "CPU ms")
        n_held = size
        lists, gets = [], []
        for _ in range(4):
            with clocks() as listed:
                assert len(opened.list()) == size
            lists.append(listed["cpu"])
            with clocks() as got:
                for number in range(0, size, max(1, size // 50)):
                    opened.get(copy(number).key).arrays["score"]
            gets.append(1e3 * got["cpu"] / len(range(0, size, max(1, size // 50))))
        table.add(
            "first list", shape, lists[:1], "CPU s", note="reads what is new into the catalogue"
        )
        table.add("list", shape, lists[1:], "CPU s")
        table.add("get, arrays read", shape, gets, "CPU ms")
        one = opened.folder(copy(0).key)
        files = list(one.iterdir())
        on_disk = sum(file.stat().st_blocks * 512 for file in [*files, one])
        table.add("on the disk", shape, [on_disk], "bytes", note=f"{len(files)} files and a folder")
        rows = (opened.path / "catalogue.sqlite").stat().st_size / size
        table.add("catalogue", shape, [rows], "bytes a result")


@contextmanager
def _unflushed() -> Iterator[None]:
    """Within the context nothing waits for the disk: only to fill a large store."""
    real, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


def _copies(folder: Path) -> Callable[[int], Any]:
    """A small result under as many keys as are wanted."""
    import workbench as wb
    from workbench.result import Result

    found = wb.run(
        "attention-sinks", tiny_model(folder), "random", limit=2, n_pos=16, inputs="random"
    )
    about = {
        "probe": found.probe,
        "version": found.version,
        "config": found.config,
        "arrays": dict(found.arrays),
        "metrics": found.metrics(),
        "labels": found.labels,
    }

    def copy(number: int) -> Any:
        key = hashlib.sha256(str(number).encode()).hexdigest()
        return Result(key=key, provenance=dict(found.provenance), **about)

    return copy


PARTS = {"overhead": overhead, "workers": workers, "ray": ray, "plan": plan, "store": store}


def main() -> None:
    """Measure what was asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--most", type=int, default=10_000)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "sweep.json")
    arguments = parser.parse_args()
    # This file's folder comes first on the path, and in it this file is called sweep.
    sys.path.remove(str(Path(__file__).resolve().parent))
    table, loads = Table(), []
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](table, Path(folder), arguments)
        loads.append(f"{name} {os.getloadavg()[0]:.1f}")
    given = f"--most {arguments.most} --cells {arguments.cells} --rounds {arguments.rounds}"
    write_record(
        "sweep",
        table.rows,
        command=f"python benchmarks/sweep.py {' '.join(arguments.parts)} {given}",
        ratio_means=RATIO_MEANS,
        better="higher",
        conditions=f"load at the end of each part: {', '.join(loads)}",
        packages=("interpretability-workbench", "torch", "transformers", "ray"),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
