"""Cleaning removes what it was told to, and never what somebody is working on."""

import errno
import os
import sqlite3

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.store.conftest import build_result
from workbench.errors import ConfigError, StoreError
from workbench.store.results import Store


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


class StoreAgainstDict(RuleBasedStateMachine):
    """Whatever is done to a store, it answers as a dict would."""

    numbers = st.integers(0, 3)

    @initialize()
    def open(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(self.folder.name, report=lambda message: None)
        self.model = {}

    @rule(number=numbers, value=st.floats(allow_nan=False), replace=st.booleans())
    def publish(self, number, value, replace):
        result = build_result(number, metrics={"value": value})
        kept = self.store.publish(result, replace=replace)
        if replace or result.key not in self.model:
            self.model[result.key] = value
        assert kept.metrics() == {"value": self.model[result.key]}

    @rule(number=numbers)
    def find(self, number):
        key = build_result(number).key
        found = self.store.find(key)
        assert (found and found.metrics()["value"]) == self.model.get(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), name=st.sampled_from(["arrays.safetensors", "result.json"]))
    def damage(self, data, name):
        key = data.draw(st.sampled_from(sorted(self.model)))
        (self.store.folder(key) / name).write_bytes(b"{}")
        assert self.store.find(key) is None
        del self.model[key]

    @rule(keep=st.integers(0, 3))
    def collect(self, keep):
        for key in self.store.gc(keep_latest=keep).removed:
            del self.model[key]
        assert len(self.model) <= keep

    @rule()
    def rebuild(self):
        assert self.store.rebuild() == len(self.model)

    @rule()
    def list(self):
        listed = {entry.key: entry.metrics["value"] for entry in self.store.list()}
        assert listed == self.model

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
