"""Checking and cleaning a store: ``verify`` and ``gc``."""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

from workbench.errors import ConfigError, DamagedResultError, StoreError
from workbench.store.catalogue import Entry, select
from workbench.store.files import explained, fault, filesystem_now, folder_size_bytes
from workbench.store.lease import is_stale
from workbench.store.outcomes import Collected, Verified
from workbench.store.record import is_key
from workbench.store.results import Store

UNFINISHED_SECONDS = 3600.0
"""A write that has not changed for so long belongs to a process that died."""


def verify(store: Store) -> Verified:
    """Compare every file of every result with its checksum; damaged results are set aside.

    Whole results that a crash left between two places are put back first.
    """
    with contextlib.suppress(OSError):
        store.shelf.rescue()
    whole: list[str] = []
    damaged: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for key in sorted(store.shelf.stamps()):
        try:
            if store.shelf.read(key, deep=True) is not None:
                whole.append(key)
        except DamagedResultError as error:
            damaged[key] = str(error)
        except StoreError as error:
            unreadable[key] = str(error)
    return Verified(tuple(whole), damaged, unreadable)


def collect(
    store: Store,
    *,
    older_than: float | int | None = None,
    keep_latest: int | None = None,
    damaged: bool = False,
    dry_run: bool = False,
) -> Collected:
    """Remove old results, never one that is being worked on, and what crashes left behind.

    Without ``older_than`` and ``keep_latest`` no result is removed, only leftovers.

    Args:
        store: The store to clean.
        older_than: Remove results made more than so many seconds ago ...
        keep_latest: ... that are not among the newest so many of their probe and model.
        damaged: Remove the results that were set aside as damaged, too.
        dry_run: Change nothing, only say what would go.

    Raises:
        ConfigError: A bound below 0.
    """
    if (older_than or 0) < 0 or (keep_latest or 0) < 0:
        raise ConfigError("older_than and keep_latest must be 0 or more")
    # What is to be deleted is decided by the results themselves, not by the catalogue's copy.
    found = [entry for key in store.shelf.stamps() if (entry := store.entry(key)) is not None]
    due = list(_due(select(found, None, None, None), older_than, keep_latest))
    with explained("clean", store.path):
        if not dry_run:
            store.shelf.rescue()
        removed = {entry.key: entry for entry in due if _remove(store, entry.key, dry_run)}
        leftovers = {path: folder_size_bytes(path) for path in _leftovers(store, damaged)}
        if not dry_run:
            for path in leftovers:
                _delete(path)
    return Collected(
        removed=tuple(removed),
        leased=tuple(entry.key for entry in due if entry.key not in removed),
        leftovers=tuple(str(path.relative_to(store.path)) for path in leftovers),
        freed_bytes=sum(entry.size_bytes for entry in removed.values()) + sum(leftovers.values()),
    )


def _due(
    entries: list[Entry], older_than: float | int | None, keep_latest: int | None
) -> Iterator[Entry]:
    """The results to remove; ``entries`` are the newest first."""
    if older_than is None and keep_latest is None:
        return
    newer: Counter[tuple[str, str]] = Counter()
    now = time.time()
    for entry in entries:
        newer[entry.probe, entry.model] += 1
        age = now - datetime.fromisoformat(entry.created).timestamp()
        kept = keep_latest is not None and newer[entry.probe, entry.model] <= keep_latest
        if not kept and (older_than is None or age > older_than):
            yield entry


def _remove(store: Store, key: str, dry_run: bool) -> bool:
    """Remove one result under its own lease; False when somebody else holds that."""
    lease = store.lease(key)
    if dry_run:
        return is_stale(lease.path)
    if not lease.try_acquire():
        return False
    try:
        store.shelf.remove(key)
    finally:
        lease.release()
    return True


def _leftovers(store: Store, damaged: bool) -> Iterator[Path]:
    if not store.path.is_dir():
        return
    is_unfinished = partial(_is_old, filesystem_now(store.path) - UNFINISHED_SECONDS)
    yield from filter(is_unfinished, _children(store.path / "temp"))
    yield from filter(is_unfinished, sorted(store.path.glob(".now-*")))
    for path in _children(store.path / "pieces"):
        # Parts of a killed run are what it would go on from; only old ones are left over.
        if not is_key(path.name) or is_stale(store.lease(path.name).path):
            yield from filter(is_unfinished, [path])
    for path in _children(store.path / "leases"):
        if is_stale(path) if is_key(path.stem) else is_unfinished(path):
            yield path
    for shard in _children(store.path / "requests"):
        for path in _children(shard):
            dead = is_key(path.name) and store.find_request(path.name) is None
            if dead or (not is_key(path.name) and is_unfinished(path)):
                yield path
    if damaged:
        yield from _children(store.path / "damaged")


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_old(limit: float, path: Path) -> bool:
    """Whether nothing in a file or folder has changed since a time: its writer is dead."""
    try:
        return max(part.lstat().st_mtime for part in (path, *path.rglob("*"))) < limit
    except FileNotFoundError:
        return False


def _delete(path: Path) -> None:
    fault("before-delete")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
