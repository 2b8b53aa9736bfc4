"""The ``local`` executor: processes on this machine, one a GPU or N threads each.

Workers are fresh interpreters that speak JSON lines over pipes: nothing is forked (CUDA would not
survive it), nothing is pickled, and a script needs no ``if __name__ == "__main__"``.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError
from workbench.execute.cell import Cell
from workbench.execute.estimate import Room, room_here
from workbench.execute.pool import Pool, Worker
from workbench.execute.protocol import Emit

GRACE_SECONDS = 0.5
"""What a worker gets to give up its leases before it is killed."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalExecutor:
    """Processes on this machine."""

    name = "local"

    def __init__(
        self, n_workers: int | None = None, *, n_threads: int | None = None, shards: bool = False
    ) -> None:
        """Choose how many.

        Args:
            n_workers: None: one a GPU; without one, as many as ``n_threads`` leaves room for.
            n_threads: Of each worker; None: its share of the cores.
            shards: Every worker may use every GPU, because models are spread over them.
        """
        check_workers(n_workers)
        if n_threads is not None and not 1 <= n_threads <= n_cores():
            raise ConfigError(
                f"threads must be between 1 and the {n_cores()} cores here; got {n_threads}"
            )
        gpus = [] if shards else gpu_names()
        by_threads = n_cores() // n_threads if n_threads and not shards else 1
        self.n_workers = n_workers or len(gpus) or by_threads
        self._gpus, self._n_threads = gpus, n_threads

    def room(self, cells: Sequence[Cell]) -> Room:
        """This machine's memory, or its GPUs'."""
        return room_here(cells, self.n_workers)

    def execute(self, cells: Sequence[Cell], store: Path, emit: Emit) -> None:
        """Run every cell; see ``workbench.execute.protocol.Executor``."""
        n_workers = min(self.n_workers, len(cells))
        crew = _Processes(store, _environments(self._gpus, n_workers, self._n_threads))
        Pool(crew, n_workers, emit).run(cells)


def check_workers(n_workers: int | None) -> None:
    """Refuse an impossible number of workers."""
    if n_workers is not None and n_workers < 1:
        raise ConfigError(f"workers must be at least 1; got {n_workers}")


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would call each GPU that can be used."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def n_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environments(
    gpus: Sequence[str], n_workers: int, n_threads: int | None = None
) -> list[dict[str, str]]:
    """One a worker: its share of the cores, and its GPU."""
    threads = str(n_threads or max(1, n_cores() // n_workers))
    # Modules are found where we find them; third parties' probes too.
    shared = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    shared |= {name: threads if n_threads else os.environ.get(name, threads) for name in THREADS}
    if not gpus:
        return [shared] * n_workers
    return [
        shared | {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(n_workers)
    ]


class _Process:
    """One worker process."""

    host = socket.gethostname()

    def __init__(self, store: Path, environment: dict[str, str]) -> None:
        self.environment = environment
        # A file, not a pipe: nobody reads it while all is well, and a full pipe would block.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workbench.execute.worker", str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, **environment},
            # Ctrl-C is for us; we tell the workers.
            start_new_session=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.name = str(self.process.pid)
        self._rest = b""

    def send(self, cell: Cell) -> None:
        """Hand it a cell; a worker that is dead already is noticed when it is read."""
        from workbench.store.strict_json import to_json

        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(to_json(cell.document()).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[dict[str, Any]]:
        """What it said since, and ``died`` at the end of it all."""
        import json

        assert self.process.stdout is not None
        piece = self.process.stdout.read()
        if piece is None:
            return []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if piece == b"":
            messages.append({"event": "died", "why": self._why()})
        return messages

    def _why(self) -> str:
        code = self.process.wait()
        if code < 0:
            hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f" ({said[-1][:200]})" if said else "")

    def close(self) -> None:
        """Forget its pipes; it is dead."""
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()
        self.log.close()


class _Processes:
    """The crew of the local executor."""

    def __init__(self, store: Path, environments: Sequence[dict[str, str]]) -> None:
        self._store = store
        self._free = list(environments)
        self._workers: dict[int, _Process] = {}
        self._selector = selectors.DefaultSelector()

    def hire(self) -> Worker:
        worker = _Process(self._store, self._free.pop(0))
        assert worker.process.stdout is not None
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self._workers[worker.process.pid] = worker
        return worker

    def news(self, timeout: float) -> list[tuple[Worker, dict[str, Any]]]:
        found: list[tuple[Worker, dict[str, Any]]] = []
        if not self._workers:
            return found
        for key, _ in self._selector.select(timeout):
            worker: _Process = key.data
            messages = worker.read()
            found += [(worker, message) for message in messages]
            if messages and messages[-1]["event"] == "died":
                self._remove(worker)
        return found

    def dismiss(self, worker: Worker) -> None:
        assert isinstance(worker, _Process)
        self._stop([worker])

    def close(self) -> None:
        self._stop(list(self._workers.values()))
        self._selector.close()

    def _stop(self, workers: Sequence[_Process]) -> None:
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
            self._remove(worker)

    def _remove(self, worker: _Process) -> None:
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        del self._workers[worker.process.pid]
        self._free.append(worker.environment)
        worker.close()
