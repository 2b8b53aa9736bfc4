"""Cleaning removes what it was told to, and never what somebody is working on."""

import errno
import os
import sqlite3

import pytest

from workbench.errors import ConfigError, StoreError


@pytest.fixture
def filled(store, make_result):
    """Five results of one probe on one model, the last the newest, and one of another."""
    for number in range(5):
        store.publish(make_result(number))
    store.publish(make_result(9, probe="reachability", provenance={"model": "demo"}))
    return store


def test_without_being_told_gc_removes_no_result(filled):
    assert filled.gc().removed == ()
    assert len(filled.list()) == 6


def test_the_latest_of_each_probe_and_model_are_kept(filled, make_result):
    removed = filled.gc(keep_latest=2).removed
    assert set(removed) == {make_result(number).key for number in (0, 1, 2)}
    assert not filled.folder(removed[0]).exists()
    assert len(filled.list()) == 3


def test_only_what_is_old_goes(filled, make_result):
    assert set(filled.gc(older_than=3600).removed) == {make_result(n).key for n in range(5)}
    assert [entry.key for entry in filled.list()] == [make_result(9).key]


def test_old_results_among_the_latest_stay(filled):
    assert len(filled.gc(older_than=3600, keep_latest=4).removed) == 1


def test_a_dry_run_changes_nothing_and_says_the_same(filled):
    planned = filled.gc(keep_latest=0, dry_run=True)
    assert len(filled.list()) == 6
    assert filled.gc(keep_latest=0) == planned
    assert filled.list() == []
    assert planned.freed_bytes > 6 * 24 * 4


def test_a_result_that_is_being_computed_stays(filled, make_result):
    with filled.lease(make_result(0).key):
        for dry_run in (True, False):
            found = filled.gc(keep_latest=0, dry_run=dry_run)
            assert found.leased == (make_result(0).key,)
            assert make_result(0).key not in found.removed
            assert found.leftovers == ()
    assert [entry.key for entry in filled.list()] == [make_result(0).key]


def test_abandoned_claims_and_dead_requests_go(filled, make_result):
    filled.remember_request("a" * 64, make_result(0).key)
    filled.remember_request("b" * 64, make_result(77).key)
    claim = filled.path / "leases" / f"{'c' * 64}.json"
    claim.parent.mkdir(exist_ok=True)
    claim.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
    os.utime(claim, (1, 1))
    assert set(filled.gc().leftovers) == {f"leases/{claim.name}", f"requests/bb/{'b' * 64}"}
    assert filled.find_request("a" * 64) == make_result(0).key
    assert filled.gc().leftovers == ()


def test_pieces_of_files_that_killed_processes_left_go_once_they_are_old(filled):
    filled.remember_request("a" * 64, filled.list()[0].key)
    pieces = [filled.path / "requests/aa" / f".{'a' * 64}.1234.tmp", filled.path / "leases/.now-1"]
    pieces[1].parent.mkdir(exist_ok=True)
    for piece in pieces:
        piece.touch()
    assert filled.gc().leftovers == ()
    for piece in pieces:
        os.utime(piece, (1, 1))
    assert {filled.path / name for name in filled.gc().leftovers} == set(pieces)
    assert not any(piece.exists() for piece in pieces)


def test_what_is_deleted_is_not_decided_by_the_catalogue(filled):
    filled.list()
    connection = sqlite3.connect(filled.catalogue.path)
    connection.execute("UPDATE results SET created = '1999-01-01', probe = key")
    connection.commit()
    connection.close()
    assert len(filled.gc(keep_latest=2).removed) == 3


def test_cleaning_a_store_that_cannot_be_written_is_one_line(filled, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with filled.lease("a" * 64):
        monkeypatch.setattr(type(filled.path), "touch", refuse)
        with pytest.raises(StoreError, match=r"cannot clean .*permission was denied"):
            filled.gc()


def test_a_negative_age_or_number_is_refused(store):
    with pytest.raises(ConfigError, match="must be 0 or more"):
        store.gc(older_than=-1)
    with pytest.raises(ConfigError, match="must be 0 or more"):
        store.gc(keep_latest=-1)
