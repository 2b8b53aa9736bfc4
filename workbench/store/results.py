"""The results store: one directory per result, published whole by one rename.

    <store>/results/<key[:2]>/<key>/    arrays.safetensors, result.json, manifest.json
    <store>/requests/                   which key a request was answered with
    <store>/pieces/                     finished parts of measurements that are under way
    <store>/leases/ temp/ damaged/      claims, unfinished writes, results that failed their checks
    <store>/catalogue.sqlite            a list of the results, rebuilt whenever it is missing

A crash leaves either nothing or a whole result. A damaged result is reported, set aside and
treated as absent.
"""

import errno
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.errors import DamagedResultError, StoreError
from workbench.result import Result
from workbench.store.arrays import StoredArrays
from workbench.store.catalogue import Catalogue, Entry, entry_of, select
from workbench.store.files import explained, replace_file
from workbench.store.lease import Lease
from workbench.store.outcomes import Collected, Imported, Verified
from workbench.store.record import (
    ARRAYS,
    DOCUMENT,
    MANIFEST,
    Record,
    is_key,
    is_safe_file_name,
    write_record,
)
from workbench.store.shelf import Shelf, default_store_path

Entries = list[Entry]  # inside Store, ``list`` is its method
SHORTEST_PREFIX = 6


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"workbench: {message}\n")


class Store:
    """A folder of results; making the object writes nothing."""

    def __init__(
        self, path: str | Path | None = None, report: Callable[[str], None] = _to_stderr
    ) -> None:
        """Choose the folder.

        Args:
            path: Where; None: ``default_store_path()``.
            report: Told, in one line each, about damage and other things a person should know.

        Raises:
            StoreError: The path is a file.
        """
        self.path = (default_store_path() if path is None else Path(path)).expanduser().absolute()
        with explained("read", self.path):
            is_file = self.path.exists() and not self.path.is_dir()
        if is_file:
            raise StoreError(f"the store {self.path} must be a folder; it is a file")
        self.report = report
        self.shelf = Shelf(self.path, report)
        self.catalogue = Catalogue(self.path / "catalogue.sqlite", report)

    def __repr__(self) -> str:
        """The folder."""
        return f"Store({str(self.path)!r})"

    def folder(self, key: str) -> Path:
        """Where the result of a key is or would be; see ``Shelf.folder``."""
        return self.shelf.folder(key)

    # Reading

    def find(self, key: str) -> Result | None:
        """The whole result of a key, or None when it must be computed.

        Every byte is checked. A damaged result is reported, set aside and counts as absent.

        Raises:
            StoreError: It cannot be read, or a newer workbench wrote it.
        """
        try:
            record = self.shelf.read(key, deep=True)
        except DamagedResultError as error:
            self.report(str(error))
            return None
        return (
            None if record is None else record.to_result(cached=True, arrays=self._arrays(record))
        )

    def get(self, key: str) -> Result:
        """The result of a key or of an unambiguous beginning of one.

        The arrays are checked when they are read.

        Raises:
            StoreError: There is none, or several begin so.
            DamagedResultError: It was damaged; it has been set aside.
        """
        key = self.resolve(key)
        record = self.shelf.read(key, deep=False)
        if record is None:
            raise self.absent(key)
        return record.to_result(cached=True, arrays=self._arrays(record))

    def resolve(self, prefix: str) -> str:
        """The one key that begins with ``prefix`` (6 characters or more).

        Raises:
            StoreError: There is none, or several.
        """
        if is_key(prefix):
            return prefix
        if len(prefix) < SHORTEST_PREFIX or not is_key(prefix.ljust(64, "0")):
            raise StoreError(
                f"a key must be given by at least {SHORTEST_PREFIX} of its lower-case hex "
                f"characters; got {prefix!r}"
            )
        with explained("read", self.path):
            shard = self.path / "results" / prefix[:2]
            found = [path.name for path in shard.glob(f"{prefix}*") if is_key(path.name)]
        if not found:
            raise self.absent(prefix)
        if len(found) > 1:
            raise StoreError(
                f"{prefix!r} must begin one key; {len(found)} begin so, give more of it"
            )
        return found[0]

    def list(
        self, probe: str | None = None, model: str | None = None, limit: int | None = None
    ) -> Entries:
        """The results, the newest first; of one probe or one model if asked."""
        if not self.shelf.shards():
            return []
        entries = self.catalogue.entries(
            self.shelf, self.entry, probe=probe, model=model, limit=limit
        )
        if entries is None:
            found = [e for key in self.shelf.stamps() if (e := self.entry(key)) is not None]
            entries = select(found, probe, model, limit)
        return entries

    def entry(self, key: str) -> Entry | None:
        """One line of the list, from the result itself; None (and a report) if it is no good."""
        record = self.look(key)
        return None if record is None else entry_of(record)

    def look(self, key: str, *, deep: bool = False) -> Record | None:
        """The small files of a result, checked; None where there is none, or (and a report) no good one.

        Args:
            key: Which.
            deep: Check every byte, not only sizes, ``manifest.json`` and ``result.json``.
        """
        try:
            return self.shelf.read(key, deep=deep)
        except StoreError as error:
            self.report(str(error))
            return None

    # Not typed as a mapping: a run-time check of types would read one of the arrays.
    def _arrays(self, record: Record) -> Any:
        """Arrays that set the result aside when they turn out damaged."""
        return StoredArrays(record, lambda error: self.shelf.set_aside(record.key, error))

    def absent(self, key: str) -> StoreError:
        """What to raise when there is no result of a key."""
        return StoreError(
            f"no result has the key {key!r} in {self.path}; "
            "'workbench results list' shows those that exist (--store chooses the folder)"
        )

    # Writing

    def publish(
        self, result: Result, *, files: Mapping[str, Path] | None = None, replace: bool = False
    ) -> Result:
        """Keep a result; it appears whole, or not at all.

        When a whole result of the key is already there, that one is kept and returned.

        Args:
            result: What to keep.
            files: More files to keep beside it, by name (a trained model's safetensors, JSON).
            replace: Put this result in the place of one that is there.

        Raises:
            StoreError: The folder cannot be written or the disk is full; nothing was changed.
        """
        for name in files or {}:
            if name in (ARRAYS, DOCUMENT, MANIFEST) or not is_safe_file_name(name):
                raise StoreError(
                    "a file beside a result must be a .safetensors, .json, .jsonl or .txt with a "
                    f"name of its own; got {name!r}"
                )
        document = result.document()
        document["provenance"].setdefault("created", datetime.now(UTC).isoformat())
        record = None
        while record is None:
            with explained("write", self.path), self.shelf.scratch(result.key) as scratch:
                write_record(scratch, document, result, files or {})
                self.shelf.move_in(scratch, result.key, replace=replace)
            # None: a gc took it, or the one that was there before, between the two lines.
            record = self.shelf.read(result.key, deep=False)
        return record.to_result(cached=False, arrays=self._arrays(record))

    def lease(self, key: str, *, wait: float | int | None = None) -> Lease:
        """A claim on a key for a ``with`` block, so that work is not done twice.

        Args:
            key: What will be computed.
            wait: Seconds to wait at most while another process computes it; None: until it has
                published or died. Look with ``find`` again inside the block.
        """
        folder = self.folder(key)
        return Lease(
            self.path / "leases", key, wait=wait, published=folder.is_dir, report=self.report
        )

    # Requests: answers without loading a model

    def remember_request(self, request: str, key: str) -> None:
        """Note which key a request (64 hex characters) was answered with."""
        self.folder(key)
        path = self._request_path(request)
        with explained("write", self.path):
            replace_file(path, key.encode())

    def find_request(self, request: str) -> str | None:
        """The key of an earlier answer to a request, if its result is still there."""
        try:
            key = self._request_path(request).read_text("ascii")
        except (OSError, ValueError):
            return None
        return key if is_key(key) and self.folder(key).is_dir() else None

    def _request_path(self, request: str) -> Path:
        if not is_key(request):
            raise StoreError(f"a request must be 64 lower-case hex characters; got {request!r}")
        return self.path / "requests" / request[:2] / request

    # Upkeep and exchange: the work is in upkeep.py and transfer.py

    def verify(self) -> Verified:
        """Check every byte of every result; damaged ones are set aside."""
        from workbench.store.upkeep import verify

        return verify(self)

    def gc(
        self,
        *,
        older_than: float | int | None = None,
        keep_latest: int | None = None,
        damaged: bool = False,
        dry_run: bool = False,
    ) -> Collected:
        """Remove old results and leftovers; see ``workbench.store.upkeep.collect``."""
        from workbench.store.upkeep import collect

        return collect(
            self, older_than=older_than, keep_latest=keep_latest, damaged=damaged, dry_run=dry_run
        )

    def rebuild(self) -> int:
        """Make the catalogue anew from the results; returns how many there are."""
        with explained("write", self.catalogue.path):
            if not self.catalogue.discard():
                raise PermissionError(errno.EACCES, "cannot remove the old catalogue")
        return len(self.list())

    def import_from(self, source: str | Path) -> Imported:
        """Take results over from a result's folder, a store, a .zip or a .tar."""
        from workbench.store.transfer import import_from

        return import_from(self, Path(source))

    def export(self, key: str, target: str | Path) -> Path:
        """Write one result as a folder, a .zip, or any format of ``Result.save``."""
        from workbench.store.transfer import export

        return export(self, key, Path(target))
