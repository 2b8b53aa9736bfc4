"""What a sweep costs besides its measurements, and how that grows.

    python benchmarks/sweep.py overhead workers machine ray plan [--most 10000] [-o FILE]

overhead   a cell beyond its measurement: the smallest model, a probe that takes milliseconds
workers    one worker against two, the same cells of the demo model
machine    two bare processes against one: steps of Python, products, copies
ray        actors on one node against processes, the same cells
plan       expanding a plan, asking the store, and estimating, at 1e2 ... ``--most`` cells

Wall and CPU seconds (of the workers too). Stores of many results: ``benchmarks/store.py``.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import Table, clocks, plan_of, tiny_model
from executors import machine, ray, workers
from record import OUT, write_record

RATIO_MEANS = "how many times faster than the first way of the same cells"


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
        held = _held(found, store)
        with clocks() as checked:
            assert len(cached_results(found, held)) == n_cells
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
            ("asking an empty store", asked),
            ("asking a store that holds all", checked),
            ("estimating", estimated),
            ("handing out", scheduled),
        ):
            table.add(name, shape, [1e6 * clock["cpu"] / n_cells], "CPU us a cell")
        if n_cells >= 1000:  # fewer do not show among what a process has already
            table.add("memory of a plan", shape, [memory / n_cells], "bytes a cell")
        table.add("plan.json", shape, [size / n_cells], "bytes a cell")


def _held(plan: Any, store: Any) -> Any:
    """A store that answers every cell, all with one small result; nothing waits for the disk."""
    import workbench as wb
    from workbench.store.results import Store

    held = Store(store.path.with_name("held"), report=lambda message: None)
    cell = plan.cells[0]
    key = wb.run(cell.probe, cell.model, cell.data, store=held, **cell.options, **cell.settings).key
    for each in plan.cells:
        path = held.path / "requests" / (request := plan.inputs.request(each))[:2] / request
        path.parent.mkdir(exist_ok=True)
        path.write_text(key)
    return held


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sizes(first: int, most: int) -> list[int]:
    found = [first]
    while 10 * found[-1] <= most:
        found.append(10 * found[-1])
    return found


PARTS = {"overhead": overhead, "workers": workers, "machine": machine, "ray": ray, "plan": plan}


def main() -> None:
    """Measure what was asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--most", type=int, default=10_000)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "sweep.json")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(PARTS)
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
