"""One form for what every benchmark measured, and its place on disk.

A benchmark writes ``benchmarks/out/<name>.json``. What is copied from there to ``benchmarks/results/``
is kept with the code, and ``docs/benchmarks.md`` is rendered from it (``benchmarks/render.py``):

    {"benchmark", "command", "conditions", "ratio_means", "better", "machine", "versions", "date",
     "rows": [{"name", "peer", ...}]}

A row is one way of doing one piece of work (``Row`` says what its entries are). What was not measured
is null, never a guess.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

OUT = Path(__file__).parent / "out"
RESULTS = Path(__file__).parent / "results"
OURS = "workbench"
"""How the name of a peer begins that is this project."""
TIE = 1.10
"""Ratios closer than this are a tie on the machines these numbers come from."""
NOT_HERE = 77
"""Exit code of a benchmark that lacks something here: a GPU, files."""


def not_here(why: str) -> NoReturn:
    """End a benchmark that lacks something here, and say what, in one line."""
    print(why, file=sys.stderr)
    raise SystemExit(NOT_HERE)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of doing one piece of work."""

    name: str
    """The piece of work; rows of one name are compared with each other."""
    peer: str
    """Who does it; ours begin with "workbench"."""
    version: str | None = None
    """Of the peer."""
    shape: str | None = None
    """Of the model and the prompts."""
    threads: int | None = None
    median: float | None = None
    least: float | None = None
    most: float | None = None
    unit: str | None = None
    """Of median, least and most."""
    ratio: float | None = None
    """To the reference; the file's ``ratio_means`` says of what."""
    ratio_least: float | None = None
    ratio_most: float | None = None
    cpu_ratio: float | None = None
    """The same of CPU time, which other work on the machine disturbs less."""
    peak_memory: float | None = None
    """MB beyond what the process had before."""
    limit: float | None = None
    """The best median that physics or arithmetic allows, in ``unit``, or the best ratio where
    there is no unit."""
    distance: float | None = None
    """How many times worse than the limit."""
    note: str = ""
    """What must be known to read the row."""
    why: str = ""
    """Why ours is behind, to be said where it is."""
    points: Sequence[tuple[float, float]] = ()
    """Size and median, where the row is a fit over sizes."""

    @property
    def is_ours(self) -> bool:
        """Whether the row is this project's."""
        return self.peer.startswith(OURS)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements, as entries of a row."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Ratio round by round to a reference measured in the same rounds, as entries of a row."""
    each = [value / base for value, base in zip(values, reference, strict=True)]
    return {"ratio": statistics.median(each), "ratio_least": min(each), "ratio_most": max(each)}


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of installed packages; one that is absent is named as such."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> str:
    """Processor and number of cores, and how busy the machine is."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores of {name}{load}"


def write_record(
    benchmark: str,
    rows: Sequence[Row],
    *,
    command: str,
    ratio_means: str,
    better: str = "lower",
    conditions: str = "",
    packages: Sequence[str] = ("torch", "transformers"),
    device: str = "",
    path: Path | None = None,
) -> Path:
    """Write what was measured and return where.

    Args:
        benchmark: Its name, and the file's.
        rows: In the order of the page.
        command: What repeats it.
        ratio_means: What a ratio is of.
        better: Whether "lower" or "higher" ratios are better.
        conditions: What else must be known: rounds, other work on the machine.
        packages: Whose versions are noted.
        device: What it ran on besides the processor, by name.
        path: The file, if not ``benchmarks/out/<benchmark>.json``.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher'; got {better!r}")
    record = {
        "benchmark": benchmark,
        "command": command,
        "conditions": conditions,
        "ratio_means": ratio_means,
        "better": better,
        "machine": "; ".join(filter(None, [device, machine()])),
        "versions": versions_of(*packages),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [_to_json(row) for row in rows],
    }
    path = path or OUT / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _to_json(row: Row) -> dict[str, Any]:
    """Entries that hold something, rounded to what was measured: four digits."""
    entries = dataclasses.asdict(row)
    for name, value in entries.items():
        if isinstance(value, float):
            entries[name] = float(f"{value:.4g}")
    entries["points"] = [[float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in row.points]
    return {name: value for name, value in entries.items() if value not in (None, "", [])}


def read_record(path: Path) -> dict[str, Any]:
    """A record with its rows as ``Row``; an entry that no row has is an error."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record["rows"] = [
        Row(**{**row, "points": tuple(tuple(point) for point in row.get("points", []))})
        for row in record["rows"]
    ]
    return record
