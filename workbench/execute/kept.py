"""A sweep as it lies in a store: which of its cells have a result, and why the others have none."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import StoreError, WorkbenchError
from workbench.execute.cell import Cell
from workbench.execute.inputs import PlanInputs
from workbench.result import SHORT_KEY

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
        if result is None or not store.folder(result).is_dir():
            result = _asked(cell, inputs, store)
        if result is None:
            missing.append(f"{cell.describe()}: {failed.get(cell.key, 'not computed yet')}")
        else:
            results.append(result)
    return KeptSweep(key, tuple(dict.fromkeys(results)), tuple(missing))


def _cells(path: Any) -> list[Cell]:
    try:
        return [Cell(**cell) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the plan of a sweep must be readable; {path}: {error}; run the sweep again, what is "
            "computed is kept"
        ) from error


def _asked(cell: Cell, inputs: PlanInputs, store: "Store") -> str | None:
    """The result that the cell's files lead to; None where they are no longer there."""
    try:
        request = inputs.request(cell)
    except WorkbenchError:
        return None
    return store.find_request(request) if request else None


def _by_cell(path: Any, name: str) -> dict[str, str]:
    """One field by key of the cell, where it is a text; a line that is cut off says nothing."""
    found = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            if isinstance(row.get(name), str):
                found[str(row["cell"])] = row[name]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
