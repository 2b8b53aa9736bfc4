"""``workbench sweep``: many runs, on one machine or several."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import STYLES, message, print_json, print_table
from workbench.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from workbench.execute.cell import Cell
    from workbench.execute.estimate import Estimate
    from workbench.execute.plan import Plan
    from workbench.execute.protocol import Emit, Executor
    from workbench.execute.sweep import Summary

SOME_FAILED = 3
"""Exit code: some cells failed, the rest are kept."""
EXECUTORS = ("local", "ray", "slurm", "nnsight")

CommaList = Annotated[str | None, typer.Option(metavar="A,B", help="comma list")]
_LISTS = (
    *("models", "probes", "data", "dtypes", "seeds", "backends", "interventions"),
    *("n_pos", "limit"),
)


@dataclass(frozen=True)
class SweepRequest:
    """The options of ``workbench sweep``."""

    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.yaml", help="The plan; see docs/sweeps.md.")
    ] = None
    executor: Annotated[
        str,
        typer.Option(metavar="E", help="local (processes here), ray, slurm, or nnsight (hosted)."),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cells at once; default: one a GPU, else one."),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of a local worker; default: its share of the cores."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and what it takes; run nothing.")
    ] = False
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check every byte of what the store holds, not only the small files."
        ),
    ] = False
    models: CommaList = None
    probes: CommaList = None
    data: CommaList = None
    dtypes: CommaList = None
    seeds: CommaList = None
    backends: CommaList = None
    interventions: CommaList = None
    n_pos: CommaList = None
    limit: CommaList = None
    device_map: Annotated[
        str | None, typer.Option(metavar="MAP", help="auto spreads each model over the devices.")
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[PROBE.]KEY=A,B", help="A probe's setting; comma list."),
    ] = None
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="For slurm, e.g. partition=gpu."),
    ] = None
    store: given.StoreFolder = None
    progress: given.Progress = "auto"
    as_json: given.AsJson = False

    def document(self) -> dict[str, Any]:
        """The plan: that of the file, with the command line's lists in the place of its own."""
        from workbench.execute.plan_file import read_list, read_plan

        plan = read_plan(self.file) if self.file is not None else {}
        for name in _LISTS:
            text = getattr(self, name)
            if text is not None:
                plan[name] = list(read_list(text))
        if self.device_map is not None:
            plan["device_map"] = self.device_map
        for pair in self.settings or ():
            plan["probes"] = _with_setting(plan.get("probes") or {}, pair)
        return plan


@given.takes(SweepRequest)
def sweep_command(request: SweepRequest) -> None:
    """Run probes on models, for every combination of a plan's values.

    What the store holds already is not run again, so the same command continues a sweep that was
    stopped. Lists may come from FILE, or from the options, which replace the file's entries.

    Example: workbench sweep plan.yaml --workers 2
    """
    from workbench.execute.plan import make_plan
    from workbench.store.results import Store

    if request.progress not in STYLES:
        raise UnknownNameError("progress style", request.progress, STYLES)
    document = request.document()
    place = Store(request.store)
    plan = make_plan(document, place.path / "hashes")
    runner = make_executor(request.executor, request.workers, plan, request.slurm, request.threads)
    rows = _estimate(plan, place, runner, request.verify)
    if request.dry_run:
        _show_plan(plan, rows, request.as_json)
        return
    from workbench.execute.sweep import describe_cells, run_plan

    if request.progress in ("auto", "bar"):
        message(describe_cells(plan.cells))
    with _watching(request.progress, plan) as watch:
        cached = {cell.key: key for cell, key, _ in rows if key is not None}
        summary = run_plan(plan, place, runner, watch, cached=cached)
    _show(plan, summary, request.as_json)
    if summary.failures:
        raise typer.Exit(SOME_FAILED)


def make_executor(
    name: str,
    workers: int | None,
    plan: "Plan",
    slurm: list[str] | None = None,
    threads: int | None = None,
) -> "Executor":
    """The executor of a name, ready to run a plan.

    Raises:
        UnknownNameError: There is none of the name.
        ConfigError: Its library is not installed, or an option does not fit it.
    """
    if name not in EXECUTORS:
        raise UnknownNameError("executor", name, EXECUTORS)
    if slurm and name != "slurm":
        raise ConfigError(f"--slurm is for --executor slurm; the executor is {name}; leave it out")
    if threads is not None and name != "local":
        raise ConfigError(
            f"--threads is for --executor local; the executor is {name}; leave it out"
        )
    if name == "local":
        from workbench.execute.local import LocalExecutor

        spread = any(cell.device_map is not None for cell in plan.cells)
        return LocalExecutor(workers, n_threads=threads, shards=spread)
    if name == "ray":
        from workbench.execute.ray import RayExecutor

        return RayExecutor(workers)
    if name == "nnsight":
        from workbench.execute.remote import RemoteExecutor

        return RemoteExecutor(workers)
    from workbench.execute.slurm import SlurmExecutor

    return SlurmExecutor(workers, given.read_settings(slurm, "--slurm"))


def _with_setting(probes: Any, pair: str) -> dict[str, Any]:
    """The probes of a plan with one more setting, ``PROBE.key=a,b``."""
    from workbench.execute.plan_file import read_list

    names = [probes] if isinstance(probes, str) else list(probes)
    by_name = {name: (probes[name] if isinstance(probes, Mapping) else None) for name in names}
    key, equals, values = pair.partition("=")
    probe, dot, setting = key.rpartition(".")
    if not dot and len(names) == 1:
        probe = names[0]
    if not equals or not setting or probe not in by_name:
        raise typer.BadParameter(
            f"--set takes PROBE.key=value with a probe of the plan; got {pair!r}"
        )
    own = {**(by_name[probe] or {}), setting.replace("-", "_"): list(read_list(values))}
    return {**by_name, probe: own}


def _estimate(
    plan: "Plan", store: Any, runner: "Executor", verify: bool
) -> list[tuple["Cell", str | None, "Estimate"]]:
    """(cell, key of its result in the store, what it takes); refuses what cannot fit."""
    from workbench.execute.estimate import Estimator, refuse_what_cannot_fit
    from workbench.execute.sweep import cached_results

    cached = cached_results(plan, store, deep=verify)
    estimator = Estimator(store, plan.inputs)
    rows = [(cell, cached.get(cell.key), estimator.estimate(cell)) for cell in plan.cells]
    cells = [cell for cell, key, _ in rows if key is None]
    room = runner.room(cells) if cells else None
    if room is not None:
        refuse_what_cannot_fit(cells, [found for _, key, found in rows if key is None], room)
    return rows


def _show_plan(
    plan: "Plan", rows: list[tuple["Cell", str | None, "Estimate"]], as_json: bool
) -> None:
    n_cached = sum(key is not None for _, key, _ in rows)
    seconds = [found.seconds for _, key, found in rows if key is None]
    known = [each for each in seconds if each is not None]
    if as_json:
        cells: list[dict[str, Any]] = [
            {**cell.document(), "result": key, "cached": key is not None}
            | {"memory_bytes": found.memory_bytes, "seconds": found.seconds}
            | {"seconds_is_lower_bound": found.is_lower_bound}
            for cell, key, found in rows
        ]
        print_json({"plan": plan.key, "cells": cells, "cached": n_cached, "seconds": sum(known)})
        return
    print_table(
        ("cell", "data", "store", "memory", "time"),
        [
            (cell.describe(), _data_text(cell.data), "cached" if key else "to run", *_takes(found))
            for cell, key, found in rows
        ],
    )
    from workbench.execute.sweep import describe_cells

    message(
        f"{describe_cells(plan.cells)}; {n_cached} cached, {len(seconds)} to run"
        f"{_time_text(len(seconds) - len(known), math.fsum(known))}"
    )


def _time_text(n_unknown: int, seconds: float) -> str:
    """What the cells that are to run will take on one worker."""
    if n_unknown and not seconds:
        return ", how long they take is not known" if n_unknown > 1 else ", how long is not known"
    more = f", and {n_unknown} more of unknown length" if n_unknown else ""
    return f", at least {seconds:.2g} s on one worker{more}" if seconds else ""


def _data_text(data: Any) -> str:
    if isinstance(data, Mapping):
        return ", ".join(f"{name}={source}" for name, source in data.items())
    return "-" if data is None else str(data)


def _takes(found: "Estimate") -> tuple[str, str]:
    memory = "?" if found.memory_bytes is None else f"{found.memory_bytes / 1e9:.2f} GB"
    if found.seconds is None:
        return memory, "?"
    return memory, f"{'>= ' if found.is_lower_bound else '~ '}{found.seconds:.2g} s"


@contextmanager
def _watching(style: str, plan: "Plan") -> Iterator["Emit"]:
    """What shows the events: a bar, lines for people, JSON lines, or nothing."""
    from workbench.cli.sweep_progress import watching

    with watching(style, plan) as watch:
        yield watch


def _show(plan: "Plan", summary: "Summary", as_json: bool) -> None:
    counts = {name: summary.count(name) for name in ("computed", "cached", "failed")}
    asked = {cell.key: cell for cell in plan.cells}
    if as_json:
        cells: list[dict[str, Any]] = [
            {"cell": asked[one.cell].describe(), "status": one.status, "key": one.result}
            | {"seconds": one.seconds, "error": one.error}
            for one in summary.outcomes
        ]
        print_json(
            {"plan": plan.key, **counts, "cells": cells, "path": summary.folder}
            | {"seconds": round(summary.seconds, 3)}
        )
    else:
        rows = [
            (asked[one.cell].describe(), one.status, (one.result or "")[:12])
            for one in summary.outcomes
        ]
        print_table(("cell", "status", "key"), rows)
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    message(f"{words} in {summary.seconds:.2g} s")
    for failure in summary.failures:
        message(f"failed: {asked[failure.cell].describe()}: {failure.error}")
    if summary.failures:
        message(f"kept: {summary.folder / 'failures.jsonl'}; the same command tries these again")
