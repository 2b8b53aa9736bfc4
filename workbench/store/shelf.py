"""The directories of a store: how a result gets in whole, and out whole, and nothing between."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from workbench.errors import DamagedResultError, StoreError
from workbench.store.files import exchange, explained, fault, sync_folder
from workbench.store.record import Record, RemovedResultError, is_key, read_record

REPLACED = "replaced"
"""Begins the name of a directory in ``temp/`` that holds a result until another is in its place."""
_SHARD = re.compile(r"[0-9a-f]{2}")
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST}


def default_store_path() -> Path:
    """``$WORKBENCH_HOME``, else the platform's folder for a program's data.

    Raises:
        StoreError: There is no home folder.
    """
    if home := os.environ.get("WORKBENCH_HOME"):
        return Path(home)
    try:
        user = Path.home()
    except RuntimeError as error:
        raise StoreError(
            "the store needs a folder and no home directory was found; set WORKBENCH_HOME"
        ) from error
    if sys.platform == "darwin":
        base = user / "Library" / "Application Support"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or user / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or user / ".local" / "share")
    return base / "interpretability-workbench"


class Shelf:
    """Where results stand, one directory each, and the moves that crashes cannot tear apart."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        """Choose the folder; nothing is written.

        Args:
            path: The store.
            report: Told in one line about a damaged result that was in the way.
        """
        self.path = path
        self._report = report

    def folder(self, key: str) -> Path:
        """Where the result of a key is or would be.

        Raises:
            StoreError: Not a key; nothing else ever becomes a path.
        """
        if not is_key(key):
            raise StoreError(f"a key must be 64 lower-case hex characters; got {key!r}")
        return self.path / "results" / key[:2] / key

    def shards(self) -> dict[str, int]:
        """When each of the directories that results are spread over was last changed (ns)."""
        found = {}
        with explained("read", self.path), contextlib.suppress(FileNotFoundError):
            for shard in list(os.scandir(self.path / "results")):
                with contextlib.suppress(FileNotFoundError):
                    if _SHARD.fullmatch(shard.name) and shard.is_dir():
                        found[shard.name] = _changed(shard.stat())
        return found

    def scan(self, shard: str) -> dict[str, int]:
        """When each result's directory in a shard was last changed (nanoseconds), by key."""
        found = {}
        with explained("read", self.path), contextlib.suppress(FileNotFoundError):
            for folder in list(os.scandir(self.path / "results" / shard)):
                # gc and set_aside may take a directory away under our eyes.
                with contextlib.suppress(FileNotFoundError):
                    named = is_key(folder.name) and folder.name.startswith(shard)
                    if named and folder.is_dir():
                        found[folder.name] = _changed(folder.stat())
        return found

    def stamps(self) -> dict[str, int]:
        """When each result's directory was last changed (nanoseconds), by key."""
        return {key: stamp for shard in self.shards() for key, stamp in self.scan(shard).items()}

    def read(self, key: str, *, deep: bool) -> Record | None:
        """Read and check a result; a damaged one is set aside before its error goes on.

        Args:
            key: Which; all 64 characters.
            deep: Check every byte, not only sizes and ``result.json``.
        """
        folder = self.folder(key)
        while True:
            before = _identity(folder)
            try:
                with explained("read", folder):
                    record = read_record(folder, key)
                    if record is not None and deep:
                        record.check_contents()
                return record
            except RemovedResultError:
                return None
            except DamagedResultError as error:
                # Put in the place of another between two files of one look: whole, but not the one
                # whose manifest was read.
                if _identity(folder) == before:
                    raise self.set_aside(key, error) from error

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty directory on the store's filesystem, gone afterwards unless it was moved."""
        path = self.path / "temp" / f"{name[:16]}-{os.getpid()}-{secrets.token_hex(8)}"
        with explained("write", self.path):
            path.mkdir(parents=True)
        try:
            fault("after-scratch")
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def move_in(self, scratch: Path, key: str, *, replace: bool = False) -> bool:
        """Publish a finished directory by one rename; False when a whole result was there."""
        folder = self.folder(key)
        new_shard = not folder.parent.exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        fault("after-shard")
        if new_shard:
            sync_folder(folder.parent.parent)
        fault("before-rename")
        # Each round clears away what was in the way; a third can only be needed by a race.
        for last in (False, False, True):
            if self._place(scratch, folder, last):
                break
            if replace and self._swap(scratch, folder):
                break
            if not replace and self._holds_whole(key):
                return False
        fault("after-rename")
        sync_folder(folder.parent)
        fault("after-publish")
        return True

    def _place(self, scratch: Path, folder: Path, must: bool) -> bool:
        try:
            scratch.rename(folder)
        except OSError as error:
            if error.errno not in _IN_THE_WAY or must:
                raise
            return False
        return True

    def _swap(self, scratch: Path, folder: Path) -> bool:
        """Put a directory in the place of another; False when a third came in between."""
        if exchange(scratch, folder):
            # What was there goes with the scratch directory.
            fault("after-exchange")
            return True
        # ``rescue`` finds what was there if we die between the two moves.
        with self.scratch(f"{REPLACED}-{folder.name}") as aside:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(aside / folder.name)
            fault("between-moves")
            try:
                return self._place(scratch, folder, must=False)
            except OSError:
                with contextlib.suppress(OSError):
                    (aside / folder.name).rename(folder)
                raise

    def _holds_whole(self, key: str) -> bool:
        try:
            return self.read(key, deep=True) is not None
        except DamagedResultError as error:
            self._report(str(error))
            return False

    def remove(self, key: str) -> None:
        """Take a result away; a reader sees all of it or none of it."""
        with self.scratch(f"removed-{key}") as scratch, contextlib.suppress(FileNotFoundError):
            self.folder(key).rename(scratch / key)
            fault("after-remove")

    def set_aside(self, key: str, error: DamagedResultError) -> DamagedResultError:
        """Move a damaged result to ``damaged/`` and return the error that says so."""
        folder = self.folder(key)
        aside = self.path / "damaged" / f"{key}-{time.time_ns():x}"
        try:
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
            fault("after-set-aside")
        except OSError:
            return DamagedResultError(f"{error}; it is not used, and could not be moved away")
        # Between check and rename another process may have put a whole result there.
        if _is_whole(aside, key):
            with contextlib.suppress(OSError):
                aside.rename(folder)
        return DamagedResultError(f"{error}; it was set aside in {aside}, compute it again")

    def rescue(self) -> list[str]:
        """Put whole results back that a crash left between two places; returns their keys.

        Two moves cannot be one step: a replacement where directories cannot be swapped, and the
        way back of a whole result that was set aside by mistake.
        """
        places = [*(self.path / "damaged").glob("*"), *(self.path / "temp").glob(f"{REPLACED}-*/*")]
        rescued = []
        for place in places:
            key = place.name[:64]
            if is_key(key) and not self.folder(key).exists() and _is_whole(place, key):
                with contextlib.suppress(OSError):
                    place.rename(self.folder(key))
                    fault("after-rescue")
                    sync_folder(self.folder(key).parent)
                    rescued.append(key)
                    self._report(f"result {key} was found whole in {place.parent} and put back")
        return rescued


def _changed(status: os.stat_result) -> int:
    # A copy may keep the time of its contents; that of the directory itself cannot be set.
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _is_whole(folder: Path, key: str) -> bool:
    try:
        record = read_record(folder, key)
        if record is not None:
            record.check_contents()
    except StoreError:
        return False
    return record is not None


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells one directory from another that took its place; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
