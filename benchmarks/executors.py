"""The same cells on one worker, on two, and on actors of Ray; parts of ``sweep.py``."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import Table, clocks, plan_of
from record import Row, ratios


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


def machine(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """What two bare processes at once get of this machine: the limit of two workers."""
    for name, work in BARE.items():
        alone, both = [], []
        for _ in range(BARE_ROUNDS):
            alone += _bare(work, 1)
            both.append(max(_bare(work, 2)) / 2)
        table.add(name, "2000 times", alone, "s", "one process")
        table.add(name, "2000 times", both, "s", "two processes", **ratios(alone, both))


BARE_ROUNDS = 5
BARE = {
    "steps of Python": "sum(range(20_000))",
    "products in the cache": "one @ one",
    "copies through memory": "large.copy_(other)",
}
"""What two processes at once get of the machine's two cores, whatever they run."""
_BARE = """
import sys, time, torch
torch.set_num_threads(1)
one, large, other = torch.ones(192, 192), torch.ones(1 << 21), torch.ones(1 << 21)
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
for _ in range(2000):
    {work}
print(time.perf_counter() - start)
"""


def _bare(work: str, n_processes: int) -> list[float]:
    """Seconds of each of some processes that do the same at the same time."""
    code = [sys.executable, "-c", _BARE.format(work=work)]
    started = [
        subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(n_processes)
    ]
    for process in started:
        process.stdout.readline()  # type: ignore[union-attr]
    for process in started:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return [float(process.communicate()[0]) for process in started]


def ray(table: Table, folder: Path, arguments: argparse.Namespace) -> None:
    """The same cells on actors and on processes in turn: two of each, or one where there is one core."""
    import ray as library

    from workbench.execute.local import LocalExecutor, n_cores
    from workbench.execute.ray import RayExecutor

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    n = min(2, n_cores())
    shape = f"{arguments.cells} cells, {n} worker{'s' * (n > 1)}"
    try:
        # "local": what another Ray left behind on this machine is not connected to.
        library.init(
            address="local",
            num_cpus=n,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray raises no class of its own where its node does not start
        note = f"not measured: {' '.join(str(error).split())[:200]}"
        print(note, file=sys.stderr)
        table.rows.append(
            Row(name="whole sweep", peer="workbench, Ray actors", shape=shape, note=note)
        )
        return
    local, actors = [], []
    for turn in range(arguments.rounds):
        local.append(_sweep(folder / f"l{turn}", LocalExecutor(n, n_threads=1), arguments))
        actors.append(_sweep(folder / f"r{turn}", RayExecutor(n), arguments))
    library.shutdown()
    _compare(table, "processes", "Ray actors", shape, local, actors, cpu=False)


def _sweep(path: Path, executor: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Clocks of one sweep in an empty store: the whole, until workers are ready, and a cell of each."""
    from workbench.execute.cell import Outcome
    from workbench.execute.protocol import Started
    from workbench.execute.sweep import run_plan
    from workbench.store.results import Store

    store = Store(path, report=lambda message: None)
    plan = plan_of(
        "demo", arguments.cells, store.path / "hashes", limit=100, n_pos=64, batch_size=10
    )
    worker_of: dict[str, str] = {}
    ended: dict[str, list[float]] = {}
    ready: list[float] = []

    def watch(event: Any) -> None:
        if isinstance(event, Started):
            ready.append(time.perf_counter())
            worker_of[event.cell] = event.worker
        elif isinstance(event, Outcome):
            ended.setdefault(worker_of[event.cell], []).append(time.perf_counter())

    begun = time.perf_counter()
    with clocks() as found:
        summary = run_plan(plan, store, executor, watch)
    assert summary.count("computed") == arguments.cells
    found["ready"] = ready[0] - begun
    found["load"] = max(one.load_seconds for one in summary.outcomes)
    # What a long sweep tends to: cells a second of all workers, each from its first result to its last.
    pace = sum((len(times) - 1) / (times[-1] - times[0]) for times in ended.values() if times[1:])
    found["steady"] = 1 / pace
    warm = [one.seconds for one in summary.outcomes if not one.load_seconds]
    found["cell"] = statistics.median(warm)
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
    kinds = {
        "wall": ("whole sweep", "s"),
        "ready": ("until the first worker is ready", "s"),
        "load": ("loading the model", "s"),
        "cell": ("a cell in its worker", "s"),
        "steady": ("cells at the pace of all workers", "s a cell"),
    }
    if cpu:
        kinds["cpu"] = ("whole sweep, CPU", "CPU s")
    for kind, (name, unit) in kinds.items():
        first, second = ([each[kind] for each in times] for times in (before, after))
        table.add(name, shape, first, unit, base)
        table.add(name, shape, second, unit, other, **ratios(first, second))
