"""The ``nnsight`` executor: cells on models that NDIF hosts, too large for this site.

Forward passes run there (NDIF_HOST names another server of the kind), what the probe reads comes
back and is reduced here; the cells run one after another in this process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import CapabilityError, ConfigError
from workbench.execute.cell import Cell, LoadedModel, run_cell, store_at
from workbench.execute.protocol import Advanced, Emit, Started


class RemoteExecutor:
    """One queue at NDIF; its key is in NDIF_API_KEY."""

    name = "nnsight"
    n_workers = 1

    def __init__(self, n_workers: int | None = None) -> None:
        """Make sure of the key before anything is planned on it.

        Raises:
            ConfigError: More than one worker, or no key.
        """
        if n_workers not in (None, 1):
            raise ConfigError(
                f"the nnsight executor has one queue; got {n_workers} workers; leave --workers out"
            )
        from workbench.models.nnsight_remote import refuse_without_key

        try:
            refuse_without_key()
        except CapabilityError as error:
            raise ConfigError(f"{error}; for models on this machine: --executor local") from error

    def room(self, cells: Sequence[Cell]) -> None:
        """Not known: the models are elsewhere."""

    def execute(self, cells: Sequence[Cell], store: Path, emit: Emit) -> None:
        """Run every cell; see ``workbench.execute.protocol.Executor``.

        Raises:
            ConfigError: Cells of another backend.
        """
        from workbench.run import Reporter

        if any(cell.options.get("backend") != "nnsight" for cell in cells):
            raise ConfigError(
                "the nnsight executor runs cells of the nnsight backend; the plan has others; write "
                "backends: nnsight"
            )
        loaded, place = LoadedModel(_point_at), store_at(store)
        for cell in sorted(cells, key=lambda cell: cell.load_key):
            emit(Started(cell.key, "NDIF"))

            def advance(done: int, total: int, key: str = cell.key) -> None:
                emit(Advanced(key, done, total))

            emit(run_cell(cell, place, loaded, Reporter(advance)))


def _point_at(cell: Cell) -> Any:
    from workbench.models.nnsight_building import load_remote

    return load_remote(cell.model, cell.options.get("revision"))
