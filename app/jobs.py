"""Jobs: runs that were started from a page, each in a process of its own.

    <store>/jobs/<id>/request.json    what was asked, written before the process starts
                      status.json     process id and birth; at the end how it went
                      log             what the process told on stderr, progress among it
                      out.json        what it printed: the key of its result
                      cancel.json     somebody asked it to stop

A job belongs to no tab: whoever looks into the folder finds it. Its id is made of the request's
hash and a counter, so that the same request, already running, is found instead of started twice.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.job_log import last_lines, message_of, numbers_of, progress_of
from workbench.errors import StoreError
from workbench.processes import birth_of, is_alive
from workbench.store.files import explained, replace_file
from workbench.store.strict_json import read_object, to_json

ID = re.compile(r"[0-9a-f]{20}")
RUNNING = ("starting", "running", "stopping")
STATES = (*RUNNING, "done", "failed", "cancelled", "killed")
START_SECONDS = 20.0
"""A job that has not announced its process after so long never will."""
GRACE_SECONDS = 15.0
"""Between asking a job to stop and stopping it by force."""
_children: list[subprocess.Popen[bytes]] = []  # kept, so that each can be asked for its exit code


@dataclass(frozen=True)
class Request:
    """What a job is to do."""

    kind: str
    """``run``, ``train`` or ``sweep``."""
    name: str
    """The probe, the toy task, or ``sweep``."""
    arguments: tuple[str, ...]
    """The command line after ``workbench``."""
    about: dict[str, Any] = field(default_factory=dict)
    """Model, data, settings, a plan's key: for the page, and for the notebook that repeats the run."""

    @property
    def hash(self) -> str:
        """16 hex characters; equal requests have equal ones."""
        text = json.dumps([self.kind, self.name, *self.arguments])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A job as its folder tells it now."""

    id: str
    folder: Path
    request: Request
    created: str
    """ISO 8601 in UTC."""
    state: str
    """One of STATES."""
    done: int = 0
    total: int = 0
    """Progress; 0 of 0 when nothing is known."""
    message: str = ""
    """The last line that is no progress, or what it was told when it failed."""
    key: str = ""
    """Of its result."""
    seconds: float = 0.0
    """How long it has run, or ran."""

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.state in RUNNING


def jobs_folder(store: Path) -> Path:
    """Where a store keeps its jobs."""
    return store / "jobs"


def start(store: Path, request: Request) -> tuple[Job, bool]:
    """Start a job, or find the one that is running on the same request.

    Returns:
        The job, and whether it was started by this call.

    Raises:
        StoreError: The store cannot be written.
    """
    folder = jobs_folder(store)
    with explained("write", store):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            earlier = sorted(path.name for path in folder.glob(f"{request.hash}????"))
            if earlier and (job := read(store, earlier[-1])) is not None and job.is_running:
                return job, False
            number = int(earlier[-1][16:], 16) + 1 if earlier else 0
            place = folder / f"{request.hash}{number:04x}"
            # Two tabs may be here at once: one of them makes the folder, the other finds it.
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                break
        _launch(store, place, request)
    job = read(store, place.name)
    if job is None:
        raise StoreError(f"a job was started and its folder {place} has gone; check the disk")
    return job, True


def _launch(store: Path, place: Path, request: Request) -> None:
    document = {
        "kind": request.kind,
        "name": request.name,
        "arguments": list(request.arguments),
        "about": request.about,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    replace_file(place / "request.json", to_json(document).encode())
    environment = {**os.environ, "WORKBENCH_HOME": str(store), "PYTHONUNBUFFERED": "1"}
    with (place / "log").open("wb") as log, (place / "out.json").open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "app.job_process", str(place)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env=environment,
            # A session of its own: closing the terminal of the page does not reach it.
            start_new_session=True,
        )
    _children.append(child)


def read(store: Path, job_id: str) -> Job | None:
    """A job by its id; None when there is none or its folder tells nothing."""
    if ID.fullmatch(job_id) is None:
        return None
    _reap()
    folder = jobs_folder(store) / job_id
    request, status = read_object(folder / "request.json"), read_object(folder / "status.json")
    if not folder.is_dir():
        return None
    created = str(request.get("created") or _stamp(folder))
    about, arguments = request.get("about"), request.get("arguments")
    asked = Request(
        str(request.get("kind", "run")),
        str(request.get("name", "")),
        tuple(map(str, arguments)) if isinstance(arguments, list) else (),
        about if isinstance(about, dict) else {},
    )
    state = _state(folder, status)
    done, total, message = progress_of(folder / "log")
    found = read_object(folder / "out.json")
    end = status.get("finished") or (None if state in RUNNING else _stamp(folder / "log"))
    return Job(
        job_id,
        folder,
        asked,
        created,
        state,
        done,
        total,
        message,
        str(found.get("key", "")),
        _seconds(created, end),
    )


def listing(store: Path, limit: int = 200) -> list[Job]:
    """The jobs of a store, the newest first, running ones before all others."""
    folder = jobs_folder(store)
    try:
        found = [
            (entry.stat().st_ctime_ns, entry.name)
            for entry in os.scandir(folder)
            if ID.fullmatch(entry.name)
        ]
    except OSError:
        return []
    newest = [name for _, name in sorted(found, reverse=True)[:limit]]
    jobs = [job for name in newest if (job := read(store, name)) is not None]
    jobs.sort(key=lambda job: job.created, reverse=True)
    return sorted(jobs, key=lambda job: not job.is_running)


def cancel(job: Job, grace: float = GRACE_SECONDS) -> None:
    """Ask a job to stop; one that does not is stopped by force after ``grace`` seconds."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    # First the request, then the look: a process that announces itself in between sees the request.
    replace_file(job.folder / "cancel.json", to_json({"asked": now}).encode())
    status = read_object(job.folder / "status.json")
    pid, birth = status.get("pid"), _birth(status)
    if not isinstance(pid, int) or not is_alive(pid, birth):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)

    def insist() -> None:
        end = time.monotonic() + grace
        while time.monotonic() < end:
            if not is_alive(pid, birth):
                return
            time.sleep(0.2)
        # The number may be another process's by now; its birth says whether it is.
        if birth_of(pid) == birth:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    threading.Thread(target=insist, daemon=True, name=f"cancel {job.id}").start()


def log_tail(job: Job, lines: int = 40) -> str:
    """The end of what a job told, progress lines left out."""
    kept = [line for line in last_lines(job.folder / "log") if numbers_of(line) is None]
    return "\n".join(message_of(line) for line in kept[-lines:])


def _birth(status: Mapping[str, Any]) -> str | None:
    """When the process began, as ``birth_of`` tells it; None where the file holds no such text."""
    birth = status.get("birth")
    return birth if isinstance(birth, str) else None


def _state(folder: Path, status: Mapping[str, Any]) -> str:
    final = status.get("state")
    if final in ("done", "failed"):
        return str(final)
    asked = (folder / "cancel.json").exists()
    pid = status.get("pid")
    if not isinstance(pid, int):
        return _unannounced(folder, asked=asked)
    if is_alive(pid, _birth(status)):
        # One that has noted its cancelling still closes its libraries; cancelled means gone.
        return "stopping" if asked or final == "cancelled" else "running"
    # It may have written its end between the two looks.
    final = read_object(folder / "status.json").get("state")
    if final in ("done", "failed", "cancelled"):
        return str(final)
    return "cancelled" if asked else "killed"


def _unannounced(folder: Path, *, asked: bool) -> str:
    """The state of a job whose process has not said its number yet, or never will."""
    try:
        age = time.time() - folder.stat().st_mtime
    except OSError:
        return "killed"
    if age < START_SECONDS:
        return "stopping" if asked else "starting"
    return "cancelled" if asked else "killed"


def _stamp(path: Path) -> str:
    try:
        moment = path.stat().st_mtime
    except OSError:
        moment = time.time()
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def _seconds(start: str, end: str | None) -> float:
    try:
        first = datetime.fromisoformat(start)
        last = datetime.now(UTC) if end is None else datetime.fromisoformat(end)
        return max(0.0, (last - first).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _reap() -> None:
    """Ask our own children for their exit codes, so that none of them stays a zombie."""
    for child in list(_children):
        if child.poll() is not None:
            _children.remove(child)
