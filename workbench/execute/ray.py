"""The ``ray`` executor: actors that hold a model, on a Ray cluster that is already running.

Every node must see the store's folder and have the workbench installed. Cells and outcomes cross
as JSON text; when a node dies, its cells are tried once more elsewhere.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError
from workbench.execute.cell import Cell, LoadedModel, run_cell, store_at
from workbench.execute.estimate import Room
from workbench.execute.local import check_workers
from workbench.execute.pool import Pool, Worker
from workbench.execute.protocol import Emit
from workbench.store.strict_json import to_json

ASK_SECONDS = 1.0
"""How often actors are asked how far their cells are, at most; less often when there are many."""


class RayExecutor:
    """Actors on an existing cluster."""

    name = "ray"

    def __init__(self, n_workers: int | None = None, address: str = "auto") -> None:
        """Choose how many actors, and find the cluster.

        Args:
            n_workers: None: one a GPU of the cluster, else one a node.
            address: Of the cluster; ``auto``: RAY_ADDRESS, else the one on this machine.

        Raises:
            ConfigError: Ray is not installed, or there is no cluster.
        """
        check_workers(n_workers)
        self._ray = _connect(address)
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        self.n_workers = n_workers or gpus or nodes
        self._resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        if self._ray.cluster_resources().get("CPU", 0) < 1:
            raise ConfigError(
                "the ray executor needs a cluster with a core for each worker; this one has none; "
                "start its nodes with --num-cpus 1 or more"
            )

    def room(self, cells: Sequence[Cell]) -> Room | None:
        """The nodes' memory, as Ray counts it; of GPUs it knows none."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        memory = [int(node["Resources"].get("memory", 0)) for node in nodes]
        if self._resources["num_gpus"] or not any(memory):
            return None
        return Room(max(memory), self.n_workers, len(nodes))

    def execute(self, cells: Sequence[Cell], store: Path, emit: Emit) -> None:
        """Run every cell; see ``workbench.execute.protocol.Executor``."""
        crew = _Actors(self._ray, store, self._resources)
        Pool(crew, min(self.n_workers, len(cells)), emit).run(cells)


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "the ray executor needs Ray, which is not installed; pip install "
            "'interpretability-workbench[ray]', or use --executor local"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ConfigError(
                "the ray executor needs a running Ray cluster; none was found; start one with "
                "'ray start --head', or set RAY_ADDRESS"
            ) from error
    return ray


class _Holder:
    """The actor: runs cells, and holds the model of the last one.

    Ray runs two of its methods at once, so that it tells where it is while a cell runs.
    """

    def __init__(self, store: str, folder: str) -> None:
        os.chdir(folder)  # relative paths mean what they mean where the sweep was started
        self._store, self._loaded = store_at(store), LoadedModel()
        self._place: tuple[str, int, int] | None = None

    def hello(self) -> str:
        """Say where it is."""
        return f"{socket.gethostname()} process {os.getpid()}"

    def run(self, cell: str) -> str:
        """Run one cell, JSON to JSON."""
        from workbench.run import Reporter

        asked = Cell(**json.loads(cell))

        def note(done: int, total: int) -> None:
            self._place = asked.key, done, total

        outcome = run_cell(asked, self._store, self._loaded, Reporter(note))
        return to_json({"event": "finished", **asdict(outcome)})

    def where(self) -> tuple[str, int, int] | None:
        """(cell, done, total) of the last cell that said so."""
        return self._place


class _Actor:
    """One actor as the pool sees it."""

    def __init__(self, handle: Any, number: int) -> None:
        self.handle, self.name, self.host = handle, f"actor-{number}", ""
        self.cell = ""
        self.waits: dict[str, Any] = {"hello": handle.hello.remote()}
        """What was asked and is not answered yet, by method."""

    def send(self, cell: Cell) -> None:
        self.cell = cell.key
        self.waits["run"] = self.handle.run.remote(to_json(cell.document()))


class _Actors:
    """The crew of the Ray executor."""

    def __init__(self, ray: Any, store: Path, resources: dict[str, int]) -> None:
        self._ray, self._store = ray, store
        self._class = ray.remote(_Holder).options(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
            **resources,
        )
        self._actors: list[_Actor] = []
        self._hired = 0
        self._asked = time.monotonic()

    def hire(self) -> Worker:
        self._hired += 1
        handle = self._class.remote(str(self._store), str(Path.cwd()))
        actor = _Actor(handle, self._hired)
        self._actors.append(actor)
        return actor

    def news(self, timeout: float) -> list[tuple[Worker, dict[str, Any]]]:
        self._ask_where()
        waiting = {
            answer: (actor, method)
            for actor in self._actors
            for method, answer in actor.waits.items()
        }
        if not waiting:
            return []
        ready, _ = self._ray.wait(list(waiting), timeout=timeout)
        found: list[tuple[Worker, dict[str, Any]]] = []
        for answer in ready:
            actor, method = waiting[answer]
            if actor in self._actors:  # else it died, as another answer has told
                found += [(actor, message) for message in self._read(actor, method)]
        return found

    def _ask_where(self) -> None:
        if time.monotonic() - self._asked < ASK_SECONDS * max(1, len(self._actors) / 100):
            return
        self._asked = time.monotonic()
        for actor in self._actors:
            if "run" in actor.waits and "hello" not in actor.waits:
                actor.waits.setdefault("where", actor.handle.where.remote())

    def _read(self, actor: _Actor, method: str) -> list[dict[str, Any]]:
        try:
            answer = self._ray.get(actor.waits.pop(method))
        except self._ray.exceptions.RayError as error:
            self._actors.remove(actor)
            why = " ".join(str(error).split())[:200]
            return [{"event": "died", "why": f"{type(error).__name__}: {why}"}]
        if method == "run":
            return [json.loads(answer)]
        if method == "hello":
            actor.host = answer
            return [{"event": "ready"}]
        if answer is None or answer[0] != actor.cell:
            return []
        return [dict(zip(("event", "cell", "done", "total"), ("advanced", *answer), strict=True))]

    def dismiss(self, worker: Worker) -> None:
        assert isinstance(worker, _Actor)
        self._ray.kill(worker.handle)
        self._actors.remove(worker)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()
