"""A SQLite list of what a store holds, so that listing thousands of results is quick.

The catalogue is only a copy: it is brought up to date with the directories whenever it is asked,
can be deleted at any time, and where SQLite cannot work (a network filesystem, a read-only
folder) everything goes on without it. ``WORKBENCH_CATALOGUE=off`` does without it anyway: several
machines must not share one over a network.

Results are spread over 256 directories, the shards. One whose time stamp is the one that was noted
has the results that were noted; only the others are looked through. Every row carries a checksum,
which SQLite itself has not.
"""

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from workbench.provenance import edit_text, model_name
from workbench.store.files import fault, filesystem_now
from workbench.store.migrations import upgrade_catalogue
from workbench.store.record import Record
from workbench.store.shelf import Shelf
from workbench.store.strict_json import read_number, to_json

BUSY_MILLISECONDS = 5000
RACY_SECONDS = 2.0
"""A directory that changed less long ago may change again under the same time stamp."""
_COLUMNS = "key, probe, version, model, created, metrics, size_bytes, edit, checksum"
_LOOK_AGAIN = -1
"""The stamp of a shard that is looked through next time, whatever its time says."""


def is_off() -> bool:
    """Whether the environment says to do without a catalogue."""
    return os.environ.get("WORKBENCH_CATALOGUE", "").lower() == "off"


class Entry(NamedTuple):
    """One line of a list of results; a tuple, since a list may have a hundred thousand."""

    key: str
    probe: str
    version: int
    model: str
    """The model's name, "" when none is known."""
    created: str
    """When it was measured, ISO 8601 in UTC."""
    metrics_json: str
    size_bytes: int
    edit: str = ""
    """The interventions under which it was measured, in words; "" for the stock model."""

    @property
    def subject(self) -> str:
        """What was measured: the model, and how it was edited."""
        return f"{self.model} under {self.edit}" if self.edit else self.model

    @property
    def metrics(self) -> dict[str, float]:
        """The headline numbers, by name."""
        return {name: read_number(value) for name, value in json.loads(self.metrics_json).items()}

    @property
    def headline(self) -> str:
        """The first three numbers, for people."""
        first = list(self.metrics.items())[:3]
        return ", ".join(f"{name} {value:.4g}" for name, value in first)


def entry_of(record: Record) -> Entry:
    """The line of one stored result."""
    document = record.document
    return Entry(
        key=record.key,
        probe=document["probe"],
        version=document["version"],
        model=model_name(document["provenance"]),
        created=_utc(document["provenance"].get("created"), record.folder),
        metrics_json=to_json(document["metrics"]),
        size_bytes=record.size_bytes,
        edit=edit_text(document["provenance"]),
    )


def _utc(created: Any, folder: Path) -> str:
    """A time as ISO 8601 in UTC with microseconds, so that texts sort as times do."""
    try:
        moment = datetime.fromisoformat(str(created)).astimezone(UTC)
    except (ValueError, OverflowError):
        moment = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return moment.isoformat(timespec="microseconds")


class Catalogue:
    """The SQLite file of one store."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._told = False

    def entries(
        self,
        shelf: Shelf,
        read: Callable[[str], Entry | None],
        *,
        probe: str | None = None,
        model: str | None = None,
        limit: int | None = None,
    ) -> list[Entry] | None:
        """Bring the catalogue up to date and query it; None where SQLite does not work.

        Args:
            shelf: The directories of the store.
            read: Reads one result's entry; None: it cannot be served.
            probe: Only this probe's results.
            model: Only this model's results.
            limit: At most so many, the newest first.
        """
        if is_off():
            return None
        for _ in range(2):
            try:
                with self._connect() as connection:
                    if connection is None:
                        return None
                    _synchronise(connection, shelf, read)
                    return _query(connection, probe, model, limit)
            except (sqlite3.OperationalError, OSError) as error:
                self._tell(f"the catalogue cannot be used ({error}); reading the results instead")
                return None
            except sqlite3.DatabaseError as error:
                self._tell(f"the catalogue was damaged ({error}) and is made anew")
                if not self.discard():
                    return None
        return None

    def discard(self) -> bool:
        """Remove the catalogue; the next query makes it anew."""
        try:
            for suffix in ("", "-wal", "-shm", "-journal"):
                fault("before-discard-catalogue")
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection | None]:
        connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
            # Readers and one writer at once. Where the filesystem cannot, or another process is
            # changing the mode right now, the mode that there is will do.
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
            if upgrade_catalogue(connection):
                yield connection
            else:
                self._tell("the catalogue is a newer workbench's; reading the results instead")
                yield None
        finally:
            connection.close()

    def _tell(self, message: str) -> None:
        if not self._told:
            self._report(f"{message} ({self.path})")
            self._told = True


def _synchronise(
    connection: sqlite3.Connection, shelf: Shelf, read: Callable[[str], Entry | None]
) -> None:
    # The order matters: what happens after a time stamp was read is found by the next look.
    stamps = shelf.shards()
    known = dict(connection.execute("SELECT name, stamp FROM shards").fetchall())
    changed = [name for name in stamps if known.get(name) != stamps[name]]
    gone = [name for name in known if name not in stamps]
    if not changed and not gone:
        return
    settled = (filesystem_now(shelf.path) - RACY_SECONDS) * 1e9
    # Files are read before the write lock is taken, so that no other process waits for them.
    looks = [_look(connection, name, shelf.scan(name), read) for name in changed]
    connection.execute("BEGIN IMMEDIATE")
    for look in looks:
        trust = look.complete and stamps[look.shard] < settled
        _note(connection, look, stamps[look.shard] if trust else _LOOK_AGAIN)
    for name in gone:
        connection.execute("DELETE FROM results WHERE key BETWEEN ? AND ?", _span(name))
        connection.execute("DELETE FROM shards WHERE name = ?", (name,))
    fault("before-commit")
    connection.execute("COMMIT")


@dataclass(frozen=True)
class _Look:
    """What differs between a shard and its rows."""

    shard: str
    drop: list[str]
    found: list[tuple[int, Entry]]
    """Time stamp and entry of results that are new or have changed."""
    complete: bool
    """Whether every result could be read; what a newer workbench wrote may be readable later."""


def _look(
    connection: sqlite3.Connection,
    shard: str,
    stamps: Mapping[str, int],
    read: Callable[[str], Entry | None],
) -> _Look:
    rows = connection.execute(
        "SELECT key, stamp FROM results WHERE key BETWEEN ? AND ?", _span(shard)
    )
    known = dict(rows.fetchall())
    changed = [key for key, stamp in stamps.items() if known.get(key) != stamp]
    found = [(stamps[key], entry) for key in changed if (entry := read(key)) is not None]
    unreadable = set(changed) - {entry.key for _, entry in found}
    gone = [key for key in known if key not in stamps]
    return _Look(shard, [*gone, *unreadable], found, not unreadable)


def _span(shard: str) -> tuple[str, str]:
    """The least and the greatest text that a key in a shard can be."""
    return shard, f"{shard}~"


def _note(connection: sqlite3.Connection, look: _Look, stamp: int) -> None:
    connection.executemany("DELETE FROM results WHERE key = ?", [(key,) for key in look.drop])
    connection.executemany(
        f"INSERT OR REPLACE INTO results (stamp, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(changed, *entry, _checksum(*entry)) for changed, entry in look.found],
    )
    connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (look.shard, stamp))


def _checksum(
    key: str,
    probe: str,
    version: int,
    model: str,
    created: str,
    metrics: str,
    size_bytes: int,
    edit: str,
) -> int:
    """Of one row; by name, since joining a tuple takes twice as long, and a list has 100,000."""
    return zlib.crc32(
        f"{key}\n{probe}\n{version}\n{model}\n{created}\n{metrics}\n{size_bytes}\n{edit}".encode()
    )


def _query(
    connection: sqlite3.Connection, probe: str | None, model: str | None, limit: int | None
) -> list[Entry]:
    query = f"SELECT {_COLUMNS} FROM results WHERE (? IS NULL OR probe = ?) AND (? IS NULL OR model = ?)"
    given: list[Any] = [probe, probe, model, model]
    if limit is not None:
        query, given = f"{query} ORDER BY created DESC, key LIMIT ?", [*given, limit]
    found = [_checked(row) for row in connection.execute(query, given)]
    # All rows in SQLite's order of time take twice as long as all rows.
    return _newest_first(found) if limit is None else found


def _checked(row: tuple[Any, ...]) -> Entry:
    entry = Entry._make(row[:-1])
    if _checksum(*entry) != row[-1]:
        raise sqlite3.DatabaseError(f"a row does not match its checksum: {row[0]!r}")
    return entry


def select(
    entries: list[Entry], probe: str | None, model: str | None, limit: int | None
) -> list[Entry]:
    """What the catalogue's query would answer, without a catalogue."""
    chosen = [
        entry
        for entry in entries
        if (probe is None or entry.probe == probe) and (model is None or entry.model == model)
    ]
    chosen = _newest_first(chosen)
    return chosen if limit is None else chosen[:limit]


def _newest_first(entries: list[Entry]) -> list[Entry]:
    entries.sort(key=attrgetter("key"))
    entries.sort(key=attrgetter("created"), reverse=True)
    return entries
