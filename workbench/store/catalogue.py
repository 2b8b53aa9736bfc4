"""A SQLite list of what a store holds, so that listing thousands of results is quick.

The catalogue is only a copy: it is brought up to date with the directories whenever it is asked,
can be deleted at any time, and where SQLite cannot work (a network filesystem, a read-only
folder) everything goes on without it.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.result import edit_text, model_name
from workbench.store.migrations import upgrade_catalogue
from workbench.store.record import Record
from workbench.store.strict_json import read_number, to_json

BUSY_MILLISECONDS = 5000
_COLUMNS = "key, probe, version, model, created, metrics, size_bytes, edit"


@dataclass(frozen=True)
class Entry:
    """One line of a list of results."""

    key: str
    probe: str
    version: int
    model: str
    """The model's name, "" when none is known."""
    created: str
    """When it was measured, ISO 8601 in UTC."""
    metrics: dict[str, float]
    size_bytes: int
    edit: str = ""
    """The interventions under which it was measured, in words; "" for the stock model."""

    @property
    def subject(self) -> str:
        """What was measured: the model, and how it was edited."""
        return f"{self.model} under {self.edit}" if self.edit else self.model

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
        metrics={name: read_number(value) for name, value in document["metrics"].items()},
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
        stamps: Mapping[str, int],
        read: Callable[[str], Entry | None],
        *,
        probe: str | None = None,
        model: str | None = None,
        limit: int | None = None,
    ) -> list[Entry] | None:
        """Bring the catalogue up to date and query it; None where SQLite does not work.

        Args:
            stamps: When each directory of the store was last changed, by key.
            read: Reads one result's entry; None: it cannot be served.
            probe: Only this probe's results.
            model: Only this model's results.
            limit: At most so many, the newest first.
        """
        for _ in range(2):
            try:
                with self._connect() as connection:
                    if connection is None:
                        return None
                    _synchronise(connection, stamps, read)
                    return _query(connection, probe, model, limit)
            except sqlite3.OperationalError as error:
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
    connection: sqlite3.Connection,
    stamps: Mapping[str, int],
    read: Callable[[str], Entry | None],
) -> None:
    known = dict(connection.execute("SELECT key, stamp FROM results").fetchall())
    gone = [(key,) for key in known if key not in stamps]
    changed = [key for key, stamp in stamps.items() if known.get(key) != stamp]
    if not gone and not changed:
        return
    # Files are read before the write lock is taken, so that no other process waits for them.
    found = [(stamps[key], entry) for key in changed if (entry := read(key)) is not None]
    unreadable = set(changed) - {entry.key for _, entry in found}
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(
        "DELETE FROM results WHERE key = ?", gone + [(key,) for key in unreadable]
    )
    connection.executemany(
        f"INSERT OR REPLACE INTO results (stamp, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(stamp, *_row(entry)) for stamp, entry in found],
    )
    connection.execute("COMMIT")


def _row(entry: Entry) -> tuple[str, str, int, str, str, str, int, str]:
    return (
        entry.key,
        entry.probe,
        entry.version,
        entry.model,
        entry.created,
        to_json(entry.metrics),
        entry.size_bytes,
        entry.edit,
    )


def _query(
    connection: sqlite3.Connection, probe: str | None, model: str | None, limit: int | None
) -> list[Entry]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM results"
        " WHERE (? IS NULL OR probe = ?) AND (? IS NULL OR model = ?)"
        " ORDER BY created DESC, key LIMIT ?",
        (probe, probe, model, model, -1 if limit is None else limit),
    )
    return [
        Entry(key, name, version, on, created, _metrics(metrics), size, edit)
        for key, name, version, on, created, metrics, size, edit in rows
    ]


def _metrics(text: str) -> dict[str, float]:
    try:
        return {name: read_number(value) for name, value in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"a row holds no metrics: {error}") from error


def select(
    entries: list[Entry], probe: str | None, model: str | None, limit: int | None
) -> list[Entry]:
    """What the catalogue's query would answer, without a catalogue."""
    chosen = [
        entry
        for entry in entries
        if (probe is None or entry.probe == probe) and (model is None or entry.model == model)
    ]
    chosen.sort(key=lambda entry: entry.key)
    chosen.sort(key=lambda entry: entry.created, reverse=True)
    return chosen if limit is None else chosen[:limit]
