"""A sweep as it lies in a store: which of its cells have a result, and why the others have none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError, StoreError, WorkbenchError
from workbench.execute.cell import Cell
from workbench.execute.inputs import PlanInputs
from workbench.requests import Options
from workbench.result import SHORT_KEY
from workbench.settings import make_config
from workbench.store.record import is_key
from workbench.store.strict_json import read_objects

if TYPE_CHECKING:
    from workbench.store.results import Store


@dataclass(frozen=True)
class KeptSweep:
    """What is known of one sweep."""

    key: str
    results: tuple[str, ...]
    """Keys of results, in the order of the plan, each once."""
    missing: tuple[str, ...]
    """One line a cell without a result: which, and why if that is known."""


def read_sweep(store: "Store", beginning: str) -> KeptSweep:
    """Find a sweep by its key, or the beginning of it, and look its cells up.

    Raises:
        StoreError: No sweep of this store is called so, more than one is, or its plan is damaged.
    """
    folder = store.path / "sweeps"
    known = sorted(path.parent.name for path in folder.glob("*/plan.json"))
    found = [key for key in known if key.startswith(beginning)]
    if len(found) != 1 or not beginning:
        listed = ", ".join(key[:SHORT_KEY] for key in (found or known)[:5]) or "none"
        raise StoreError(
            f"a sweep is named by its key or a beginning that one key has; {len(found)} of the "
            f"{len(known)} sweeps in {store.path} begin with {beginning!r} (there: {listed})"
        )
    (key,) = found
    cells = _cells(folder / key / "plan.json")
    failed = _by_cell(folder / key / "failures.jsonl", "error")
    ended = _by_cell(folder / key / "outcomes.jsonl", "result")
    results, missing, inputs = [], [], PlanInputs(store.path / "hashes")
    for cell in cells:
        result = ended.get(cell.key)
        if result is None or not is_key(result):
            result = _asked(cell, inputs, store)
        if result is None or store.look(result) is None:
            missing.append(f"{cell.describe()}: {failed.get(cell.key, 'not computed yet')}")
        else:
            results.append(result)
    return KeptSweep(key, tuple(dict.fromkeys(results)), tuple(missing))


def _cells(path: Path) -> list[Cell]:
    try:
        return [_cell(cell) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        why = " ".join(str(error).split())[:200]
        raise StoreError(
            f"the plan of a sweep must be readable; {path}: {why}; run the sweep again, what is "
            "computed is kept"
        ) from error


def _cell(document: Mapping[str, Any]) -> Cell:
    """The cell that ``Cell.document`` wrote; somebody may have edited it since."""
    cell = Cell(**document)
    texts = (cell.key, cell.probe, cell.model, cell.intervention_name)
    mappings = (cell.settings, cell.options, cell.intervention or {})
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(mapping, dict) for mapping in mappings
    ):
        raise TypeError("a cell must have a key, a probe and a model, its settings and options")
    options = make_config(Options, cell.options, "a sweep")  # "" is null, "3" is 3
    return replace(cell, options={name: getattr(options, name) for name in cell.options})


def _asked(cell: Cell, inputs: PlanInputs, store: "Store") -> str | None:
    """The result that the cell's files lead to; None where they are no longer there."""
    try:
        request = inputs.request(cell)
    except WorkbenchError:
        return None
    return store.find_request(request) if request else None


def _by_cell(path: Path, name: str) -> dict[str, str]:
    """One field by key of the cell, where it is a text; a line that is cut off says nothing."""
    return {
        str(row["cell"]): row[name]
        for row in read_objects(path)
        if "cell" in row and isinstance(row.get(name), str)
    }
