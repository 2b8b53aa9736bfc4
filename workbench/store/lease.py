"""A claim on one key, so that two processes do not measure the same thing twice.

A lease saves work and never decides what is right: whoever publishes second finds a whole result
and keeps it. A claim is a small file that its owner touches every few seconds; when the owner
dies the touching stops, and after a few missed beats anyone may take the claim over.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.store.files import explained, fault, filesystem_now
from workbench.store.strict_json import read_object

BEAT_SECONDS = 5.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What a filesystem without hard links answers."""
MISSED_BEATS = 6
"""Beats that must be missed before a claim counts as abandoned."""


class Lease:
    """A claim on a key, held inside a ``with`` block.

    ``held`` says whether this process has the claim. It may be false inside the block: then
    somebody else published the result while we waited, or the waiting time was up.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        wait: float | int | None = None,
        published: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = lambda message: None,
        beat: float = BEAT_SECONDS,
    ) -> None:
        """Prepare a claim; nothing is written before the ``with`` block.

        Args:
            folder: Where the claims of a store are.
            key: What is claimed.
            wait: Seconds to wait for another owner at most; None: until it publishes or dies.
            published: Whether the result is there, which ends the waiting.
            report: Told once when we have to wait.
            beat: Seconds between two heartbeats.
        """
        self.path = folder / f"{key}.json"
        self.held = False
        self._wait = wait
        self._published = published
        self._report = report
        self._beat = beat
        self._owner = secrets.token_hex(16)
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        """Take the claim, or wait for its owner."""
        deadline = None if self._wait is None else time.monotonic() + self._wait
        pause, told = 0.05, False
        while not self.try_acquire() and not self._published():
            if deadline is not None and time.monotonic() >= deadline:
                break
            if not told:
                self._report(f"waiting for {describe_owner(self.path)}, which is computing this")
                told = True
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the claim back."""
        self.release()

    def try_acquire(self) -> bool:
        """Take the claim if it is free or abandoned, without waiting.

        Raises:
            StoreError: The folder cannot be written.
        """
        with explained("write", self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._create():
                if not is_stale(self.path, self._beat):
                    return False
                self._discard_stale()
                if not self._create():
                    return False
        self.held = True
        self._stop.clear()
        threading.Thread(target=self._keep_alive, name="lease", daemon=True).start()
        fault("after-lease")
        return True

    def release(self) -> None:
        """Give the claim back, unless somebody has taken it over."""
        self._stop.set()
        if self.held and self._is_ours():
            fault("before-release")
            self.path.unlink(missing_ok=True)
        self.held = False

    def _create(self) -> bool:
        content = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid()}
        draft = self.path.with_name(f".claim-{self._owner}")
        try:
            draft.write_bytes(json.dumps(content).encode())
            fault("during-lease")
            # A claim appears with its content: an empty one would keep others waiting for nobody.
            # Of two processes that link to one name at once, exactly one succeeds.
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_in_place(json.dumps(content).encode())
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_in_place(self, content: bytes) -> bool:
        try:
            # O_EXCL: of two processes that create the file at once, exactly one succeeds.
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return True

    def _discard_stale(self) -> None:
        """Remove an abandoned claim, but not one that replaced it in the meantime."""
        abandoned = read_owner(self.path)
        aside = self.path.with_name(f".stale-{self._owner}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        fault("after-stale")
        if read_owner(aside) != abandoned:
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return read_owner(self.path).get("owner") == self._owner

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._beat):
            if not self._is_ours():
                self.held = False
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)


def read_owner(path: Path) -> dict[str, Any]:
    """Who holds a claim; empty when nobody does, or while the file is being written."""
    return read_object(path)


def describe_owner(path: Path) -> str:
    """The owner of a claim, for a message."""
    owner = read_owner(path)
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def is_stale(path: Path, beat: float = BEAT_SECONDS) -> bool:
    """Whether a claim's owner is dead or has missed its beats; a claim that is gone is stale."""
    owner = read_owner(path)
    if owner.get("host") == socket.gethostname() and _is_dead(owner.get("pid")):
        return True
    try:
        age = filesystem_now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return True
    return age > MISSED_BEATS * beat


def _is_dead(pid: object) -> bool:
    # Signal 0 asks on POSIX; on Windows it would end the process, so there only beats count.
    if os.name == "nt" or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
