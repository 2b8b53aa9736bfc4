"""Numbered steps that bring an older result or an older catalogue up to today's schema.

Step n turns schema n into schema n + 1, and steps are applied in order. A step never changes
afterwards: stores written by every earlier version must still be readable.
"""

import sqlite3
from collections.abc import Callable
from typing import Any

Document = dict[str, Any]
"""The content of a ``result.json``."""


def _create_results(connection: sqlite3.Connection) -> None:
    connection.execute(
        """CREATE TABLE results (
            key TEXT PRIMARY KEY, stamp INTEGER NOT NULL, probe TEXT NOT NULL,
            version INTEGER NOT NULL, model TEXT NOT NULL, created TEXT NOT NULL,
            metrics TEXT NOT NULL, size_bytes INTEGER NOT NULL)"""
    )
    connection.execute("CREATE INDEX results_by_created ON results (created)")


def _add_edit(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE results ADD COLUMN edit TEXT NOT NULL DEFAULT ''")
    # Which of them were edited is in the results alone: all are read again.
    connection.execute("DELETE FROM results")


def _note_shards(connection: sqlite3.Connection) -> None:
    # Rows without a checksum are filled in anew from the results.
    connection.execute("DELETE FROM results")
    connection.execute("ALTER TABLE results ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0")
    connection.execute("CREATE TABLE shards (name TEXT PRIMARY KEY, stamp INTEGER NOT NULL)")


RESULT_STEPS: tuple[Callable[[Document], Document], ...] = ()
"""Steps for ``result.json``; the first would turn schema 1 into schema 2."""

CATALOGUE_STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _create_results,
    _add_edit,
    _note_shards,
)
"""Steps for the catalogue; the first turns an empty database (schema 0) into schema 1."""

RESULT_SCHEMA = 1 + len(RESULT_STEPS)
"""The schema of ``result.json`` and ``manifest.json`` that this version writes."""

CATALOGUE_SCHEMA = len(CATALOGUE_STEPS)
"""SQLite's ``user_version`` of a catalogue that this version writes."""


def upgrade_document(document: Document) -> Document:
    """Bring the content of a ``result.json`` of any earlier schema to today's."""
    for number in range(document["schema"], RESULT_SCHEMA):
        document = RESULT_STEPS[number - 1](document) | {"schema": number + 1}
    return document


def upgrade_catalogue(connection: sqlite3.Connection) -> bool:
    """Bring a catalogue to today's schema; False when a newer version of us wrote it."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version >= CATALOGUE_SCHEMA:
        return version == CATALOGUE_SCHEMA
    # The lock comes first: two processes that both find an empty file must not both create.
    connection.execute("BEGIN IMMEDIATE")
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    for number in range(version, CATALOGUE_SCHEMA):
        CATALOGUE_STEPS[number](connection)
    connection.execute(f"PRAGMA user_version = {CATALOGUE_SCHEMA}")
    connection.execute("COMMIT")
    return True
