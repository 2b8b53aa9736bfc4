"""One cell of a sweep: a run as it was asked for, and the running of it.

A cell runs through ``workbench.run.run``, so its result has the same key as that of a run by hand,
and whatever the store holds already is found.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.memory import is_out_of_memory
from workbench.requests import Options, answer

if TYPE_CHECKING:
    from workbench.run import Reporter
    from workbench.store.results import Store


@dataclass(frozen=True, eq=False)
class Cell:
    """A probe on a model: everything a run needs, as plain JSON data."""

    key: str
    """SHA-256 of the content; two cells of one key are the same."""
    probe: str
    model: str
    data: Any
    """What ``--data`` takes; a mapping of domains; None for probes that need none."""
    settings: dict[str, Any]
    """The probe's own settings."""
    options: dict[str, Any]
    """Fields of ``workbench.requests.Options``: seed, dtype, revision, n_pos, ..."""
    intervention: dict[str, Any] | None = None
    """The content of an intervention file."""
    intervention_name: str = "none"
    device_map: Any = None
    """Spreads the model over several devices; never changes the key."""

    @property
    def model_text(self) -> str:
        """The model as a plan names it."""
        revision = self.options.get("revision")
        return self.model if revision is None else f"{self.model}@{revision}"

    @property
    def load_key(self) -> str:
        """Cells with the same one can share a loaded model."""
        how = [self.options.get(name) for name in ("revision", "dtype", "backend", "device")]
        return json.dumps([self.model, *how, self.device_map])

    def describe(self) -> str:
        """The cell in a few words."""
        own = {**self.settings, **{k: v for k, v in self.options.items() if k in _SHOWN}}
        words = [f"{name}={value}" for name, value in own.items() if value not in (None, "auto")]
        if self.intervention is not None:
            words.append(self.intervention_name)
        return " ".join([self.probe, self.model_text, *words])

    def document(self) -> dict[str, Any]:
        """The cell as JSON data; ``Cell(**document)`` reads it back."""
        return asdict(self)


_SHOWN = ("seed", "dtype", "n_pos", "limit")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: str
    """Key of the cell."""
    status: str
    """``computed``, ``cached`` (it was in the store) or ``failed``."""
    result: str | None = None
    """Key of the result."""
    seconds: float = 0.0
    error: str | None = None
    """One line."""
    details: str | None = None
    """The traceback of an error that is a bug."""
    load_seconds: float = 0.0
    """Of ``seconds``, what loading the model took; 0 when it was loaded before."""


@dataclass
class LoadedModel:
    """Holds the model of the last cell, so that neighbours of one model load it once."""

    load: Callable[[Cell], Any] = field(default=lambda cell: _load(cell))
    """From a cell to its model."""
    load_key: str | None = None
    model: Any = None
    seconds: float = 0.0
    """How long the last ``get`` waited for a model."""

    def get(self, cell: Cell) -> Any:
        """The cell's model, loaded now unless it is the one at hand."""
        import time

        self.seconds = 0.0
        if cell.load_key != self.load_key:
            self.drop()
            start = time.perf_counter()
            self.model = self.load(cell)
            self.seconds = time.perf_counter() - start
            self.load_key = cell.load_key
        return self.model

    def drop(self) -> None:
        """Forget the model, before the next one needs its memory."""
        self.load_key = self.model = None


def _load(cell: Cell) -> Any:
    from workbench.models.load import load

    options = Options(**cell.options)
    return load(
        cell.model,
        options.backend,
        options.revision,
        options.dtype,
        options.device,
        cell.device_map,
    )


def run_cell(
    cell: Cell,
    store: "Store",
    loaded: LoadedModel,
    reporter: "Reporter | None" = None,
    *,
    let_through: type[Exception] | tuple[type[Exception], ...] = (),
) -> Outcome:
    """Run one cell; whatever goes wrong costs this cell only, and is told in its outcome.

    Args:
        cell: What to run.
        store: Asked first, and given the result.
        loaded: Holds the model between cells.
        reporter: Told about progress.
        let_through: What a scheduler raises in the middle of a cell to end the process.
    """
    import time

    start = time.perf_counter()
    loaded.seconds = 0.0

    def outcome(status: str, **more: Any) -> Outcome:
        seconds = round(time.perf_counter() - start, 3)
        return Outcome(
            cell.key, status, seconds=seconds, load_seconds=round(loaded.seconds, 3), **more
        )

    try:
        key, cached = _find_or_compute(cell, store, loaded, reporter)
    except let_through:
        raise
    except WorkbenchError as error:
        return outcome("failed", error=_one_line(error))
    except (MemoryError, RuntimeError) as error:
        loaded.drop()
        return outcome("failed", error=_explain(error), details=traceback.format_exc())
    # A bug in one probe must not cost the other cells; its traceback is kept, and the sweep fails.
    except Exception as error:
        loaded.drop()
        text = f"{type(error).__name__}: {_one_line(error)} (a bug; the traceback is kept)"
        return outcome("failed", error=text, details=traceback.format_exc())
    return outcome("cached" if cached else "computed", result=key)


def _find_or_compute(
    cell: Cell, store: "Store", loaded: LoadedModel, reporter: "Reporter | None"
) -> tuple[str, bool]:
    from workbench.execute.inputs import PlanInputs
    from workbench.run import run

    # Read anew for every cell: a worker that lives for days must not answer for a changed file.
    request = PlanInputs(store.path / "hashes").request(cell)
    found = answer(store, request)
    if found is not None:
        return found.key, True
    model = loaded.get(cell)
    given = () if cell.intervention is None else (cell.intervention,)
    how: Mapping[str, Any] = {**cell.options, **cell.settings}
    with model.edit(*given):
        result = run(cell.probe, model, cell.data, store=store, reporter=reporter, **how)
    if request is not None:
        store.remember_request(request, result.key)
    return result.key, result.cached


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _explain(error: BaseException) -> str:
    text = (_one_line(error))[:200]
    if is_out_of_memory(error):
        return (
            f"the cell must fit in memory; {text}; lower batch_size, n_pos or --workers, use a "
            "smaller dtype, or spread the model with device_map"
        )
    return f"{type(error).__name__}: {text} (the traceback is kept)"


def store_at(path: str | Path) -> "Store":
    """The store of a worker, which has no terminal to write to."""
    from workbench.store.results import Store

    return Store(path)
