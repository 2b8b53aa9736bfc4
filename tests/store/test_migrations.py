"""Older schemas are brought up to date step by step, in order, once."""

import sqlite3
from contextlib import closing

from workbench.store import migrations


def test_a_document_passes_through_every_later_step_in_order(monkeypatch):
    def rename(document):
        return {"b": document["a"], "seen": ["rename"]}

    def double(document):
        return {**document, "b": 2 * document["b"], "seen": [*document["seen"], "double"]}

    monkeypatch.setattr(migrations, "RESULT_STEPS", (rename, double))
    monkeypatch.setattr(migrations, "RESULT_SCHEMA", 3)
    both = {"schema": 3, "b": 2, "seen": ["rename", "double"]}
    assert migrations.upgrade_document({"schema": 1, "a": 1}) == both
    second = {"schema": 2, "b": 4, "seen": []}
    assert migrations.upgrade_document(second) == {"schema": 3, "b": 8, "seen": ["double"]}
    assert migrations.upgrade_document(both) == both


def test_a_catalogue_is_upgraded_once_and_a_newer_one_left_alone(monkeypatch):
    def add_column(connection):
        connection.execute("ALTER TABLE results ADD COLUMN note TEXT")

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        assert migrations.upgrade_catalogue(connection)
        assert connection.execute("SELECT count(*) FROM results").fetchone() == (0,)
        steps = (*migrations.CATALOGUE_STEPS, add_column)
        monkeypatch.setattr(migrations, "CATALOGUE_STEPS", steps)
        monkeypatch.setattr(migrations, "CATALOGUE_SCHEMA", len(steps))
        assert migrations.upgrade_catalogue(connection)
        assert migrations.upgrade_catalogue(connection)
        assert connection.execute("SELECT count(note) FROM results").fetchone() == (0,)
        monkeypatch.setattr(migrations, "CATALOGUE_SCHEMA", len(steps) - 1)
        assert not migrations.upgrade_catalogue(connection)


def test_rows_of_a_catalogue_without_edits_are_read_from_the_results_again():
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrations.CATALOGUE_STEPS[0](connection)
        connection.execute("PRAGMA user_version = 1")
        connection.execute("INSERT INTO results VALUES ('k', 1, 'p', 1, 'm', 'c', '{}', 0)")
        assert migrations.upgrade_catalogue(connection)
        assert connection.execute("SELECT edit FROM results").fetchall() == []


def test_the_schemas_that_this_version_writes():
    assert (migrations.RESULT_SCHEMA, migrations.CATALOGUE_SCHEMA) == (1, 3)
