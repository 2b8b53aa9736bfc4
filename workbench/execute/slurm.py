"""The ``slurm`` executor: job arrays through submitit; each job runs cells one after another.

Jobs tell what happens in files beside the store, which the submitting process follows. A job that
is preempted or runs into its time limit is put back into the queue by submitit and goes on: what
it had finished is in the store. A job that died is submitted again without the cell it died in,
when that one has had its two tries.
"""

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError
from workbench.execute.cell import Cell, LoadedModel, Outcome, run_cell, store_at
from workbench.execute.estimate import Room
from workbench.execute.local import check_workers
from workbench.execute.protocol import Advanced, Emit, Lost, Started
from workbench.execute.schedule import TRIES
from workbench.execute.worker import progress_of
from workbench.store.strict_json import to_json

LOOK_SECONDS = 0.5
TELL_SECONDS = 2.0
"""Progress inside a cell is told no more often: the journal may lie on a file server."""
_GENERAL = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")
"""Parameters that submitit has for every cluster; others are Slurm's own."""


class SlurmExecutor:
    """Job arrays of a Slurm cluster."""

    name = "slurm"

    def __init__(
        self,
        n_workers: int | None = None,
        parameters: Mapping[str, str] | None = None,
        cluster: str = "slurm",
    ) -> None:
        """Choose how many jobs run at once.

        Args:
            n_workers: Jobs of the array; None: one a model.
            parameters: ``timeout_min``, ``mem_gb``, ``gpus_per_node``, ... and Slurm's own
                (``partition``, ``account``, ``qos``).
            cluster: ``slurm``, or submitit's ``local`` for tests.

        Raises:
            ConfigError: submitit is not installed.
        """
        check_workers(n_workers)
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "the slurm executor needs submitit, which is not installed; pip install "
                "'interpretability-workbench[slurm]', or use --executor local"
            ) from error
        self._submitit = submitit
        self.n_workers = n_workers or 0
        self._parameters, self._cluster = dict(parameters or {}), cluster

    def room(self, cells: Sequence[Cell]) -> Room | None:
        """A job's memory where ``mem_gb`` says it and no GPU is asked for; else not known.

        Raises:
            ConfigError: ``mem_gb`` is no number.
        """
        given = self._parameters
        if "mem_gb" not in given or any("gpu" in name or name == "gres" for name in given):
            return None
        try:
            return Room(int(float(given["mem_gb"]) * 2**30))
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"mem_gb must be a number; got {given['mem_gb']!r}") from error

    def execute(self, cells: Sequence[Cell], store: Path, emit: Emit) -> None:
        """Run every cell; see ``workbench.execute.protocol.Executor``."""
        folder = store / "sweeps" / "jobs" / secrets.token_hex(6)
        folder.mkdir(parents=True)
        _Array(self._make(folder), store, folder, emit).run(
            share_out(cells, self.n_workers or len({cell.load_key for cell in cells}))
        )

    def _make(self, folder: Path) -> Any:
        import yaml

        given = {
            name if name in _GENERAL or name.startswith("slurm_") else f"slurm_{name}": text
            for name, text in self._parameters.items()
        }
        given = {"name": "workbench-sweep", "timeout_min": "1440"} | given
        try:
            executor = self._submitit.AutoExecutor(
                folder=folder / "submitit", cluster=self._cluster
            )
            executor.update_parameters(
                **{name: yaml.safe_load(text) for name, text in given.items()}
            )
        except (
            AssertionError,
            RuntimeError,
            NameError,
            TypeError,
            ValueError,
            yaml.YAMLError,
        ) as error:
            text = " ".join(str(error).split())
            raise ConfigError(
                f"the slurm executor must run where sbatch is, with parameters it knows; {text}; "
                "use --executor local elsewhere"
            ) from error
        return executor


def share_out(cells: Sequence[Cell], n_jobs: int) -> list[list[Cell]]:
    """Part cells among jobs, neighbours of one model together, sizes as equal as can be."""
    ordered = sorted(cells, key=lambda cell: cell.load_key)
    n_jobs = max(1, min(n_jobs, len(ordered)))
    bounds = [len(ordered) * index // n_jobs for index in range(n_jobs + 1)]
    return [ordered[start:end] for start, end in itertools.pairwise(bounds)]


@dataclass
class SweepJob:
    """What a job runs; plain texts, so that submitit can carry it anywhere."""

    cells: list[str]
    """Cells as JSON."""
    store: str
    folder: str
    """Where the sweep was started."""
    journal: str
    """The file it tells its events in."""

    def __call__(self) -> int:
        """Run every cell; those that the store holds are skipped."""
        from submitit.core.utils import UncompletedJobError

        from workbench.run import Reporter

        os.chdir(self.folder)
        store, loaded = store_at(self.store), LoadedModel()
        worker = f"{os.environ.get('SLURM_JOB_ID', os.getpid())}"
        for text in self.cells:
            cell = Cell(**json.loads(text))
            start = {"cell": cell.key, "worker": worker, "host": socket.gethostname()}
            self._tell({"event": "started", **start})
            reporter = Reporter(progress_of(cell.key, self._tell, TELL_SECONDS))
            outcome = run_cell(cell, store, loaded, reporter, let_through=UncompletedJobError)
            self._tell({"event": "finished", **asdict(outcome)})
        return len(self.cells)

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue when the job must go."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _tell(self, message: dict[str, Any]) -> None:
        with Path(self.journal).open("a", encoding="utf-8") as file:
            file.write(to_json(message) + "\n")


@dataclass
class _Running:
    """A submitted job, and how much of its journal was read."""

    job: Any
    journal: Path
    cells: list[Cell]
    read: int = 0
    ended: set[str] = field(default_factory=set)

    def news(self) -> list[dict[str, Any]]:
        """Whole lines that were added since the last look."""
        try:
            with self.journal.open("rb") as file:
                file.seek(self.read)
                piece = file.read()
        except FileNotFoundError:
            return []
        whole = piece[: piece.rfind(b"\n") + 1]
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Array:
    """Submits jobs, follows their journals, and submits again what died."""

    def __init__(self, executor: Any, store: Path, folder: Path, emit: Emit) -> None:
        self._executor, self._store, self._folder, self._emit = executor, store, folder, emit
        self._tries: dict[str, int] = {}
        self._n_jobs = 0

    def run(self, shares: Sequence[Sequence[Cell]]) -> None:
        """Run all, one job a share."""
        running = self._submit(shares)
        try:
            while running:
                time.sleep(LOOK_SECONDS)
                for one in list(running):
                    # Asked before the journal is read: a job that is done has written its last.
                    done = one.job.done()
                    self._follow(one)
                    if done:
                        running.remove(one)
                        running += self._after(one)
        finally:
            for one in running:
                one.job.cancel(check=False)

    def _submit(self, shares: Sequence[Sequence[Cell]]) -> list[_Running]:
        planned = []
        for cells in shares:
            self._n_jobs += 1
            journal = self._folder / f"job-{self._n_jobs}.jsonl"
            texts = [to_json(cell.document()) for cell in cells]
            work = SweepJob(texts, str(self._store), str(Path.cwd()), str(journal))
            planned.append((work, journal, list(cells)))
        with self._executor.batch():
            jobs = [self._executor.submit(work) for work, _, _ in planned]
        return [
            _Running(job, journal, cells)
            for job, (_, journal, cells) in zip(jobs, planned, strict=True)
        ]

    def _follow(self, one: _Running) -> None:
        for message in one.news():
            kind = message.pop("event")
            if kind == "started":
                self._emit(Started(**message))
            elif kind == "advanced":
                self._emit(Advanced(**message))
            else:
                outcome = Outcome(**message)
                if outcome.cell not in one.ended:  # a requeued job tells its first cells again
                    one.ended.add(outcome.cell)
                    self._emit(outcome)

    def _after(self, one: _Running) -> list[_Running]:
        """Submit again what a job that died has left."""
        left = [cell for cell in one.cells if cell.key not in one.ended]
        if not left:
            return []
        # Cells run in order: the first without an outcome is the one it died in.
        first, why = left[0], _why(one.job)
        self._tries[first.key] = self._tries.get(first.key, 0) + 1
        if self._tries[first.key] >= TRIES:
            self._emit(Outcome(first.key, "failed", error=f"its job died twice, last: {why}"))
            left = left[1:]
        else:
            self._emit(Lost(first.key, str(one.job.job_id), why))
        return self._submit([left]) if left else []


def _why(job: Any) -> str:
    error = job.exception()
    lines = str(error).strip().splitlines() if error is not None else []
    return f"{job.state}" + (f", {lines[-1][:200]}" if lines else "")
