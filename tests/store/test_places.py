"""Disks that are full, folders nobody may write to, file systems that cannot lock: real ones."""

import fcntl
import itertools
import sqlite3

import numpy as np
import pytest

from tests.store import kernel
from tests.store.conftest import build_result, key_of
from workbench.errors import StoreError
from workbench.store.pieces import Pieces
from workbench.store.results import Store

SMALL = 256 << 10


def large(number):
    return build_result(number, arrays={"score": np.full(4000, number, np.float32)})


def fill_a_disk(folder):
    kernel.own_mounts()
    kernel.mount_small(folder, SMALL)
    store, kept = Store(folder / "store", report=lambda message: None), []

    def publish_many():
        for number in range(100):
            store.publish(large(number))
            kept.append(key_of(number))

    with pytest.raises(StoreError) as caught:
        publish_many()
    assert "the disk is full; free some space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 3 < len(kept) < 20
    return store, kept


def test_on_a_full_disk_a_write_is_refused_in_one_line_and_nothing_is_lost(tmp_path):
    def work():
        store, kept = fill_a_disk(tmp_path)
        assert list((store.path / "temp").iterdir()) == []
        ballast = tmp_path / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
            file.writelines(itertools.repeat(bytes(512)))
        # Reading goes on, the list too, with or without room for its catalogue.
        assert set(store.verify().whole) == set(kept)
        assert {entry.key for entry in store.list()} == set(kept)
        for number, key in enumerate(kept):
            np.testing.assert_array_equal(store.find(key).arrays["score"], large(number).score)
        for write in (
            lambda: store.publish(large(50)),
            lambda: store.remember_request("d" * 64, kept[0]),
            lambda: store.lease(key_of(50)).try_acquire(),
            lambda: store.import_from(store.folder(kept[0])),
            lambda: Pieces(store.path, key_of(50)).get_or_compute(
                "a", lambda: {"x": large(1).score}
            ),
        ):
            with pytest.raises(StoreError, match="the disk is full") as caught:
                write()
            assert "\n" not in str(caught.value)
        assert set(store.verify().whole) == set(kept)
        ballast.unlink()
        # A claim that could not be written keeps nobody waiting.
        with store.lease(key_of(50), wait=0) as lease:
            assert lease.held
        store.shelf.remove(kept[0])
        assert store.publish(large(50)).metrics() == large(50).metrics()

    kernel.in_child(work)


def test_a_replacement_on_a_full_disk_leaves_the_old_result(tmp_path):
    def work():
        store, kept = fill_a_disk(tmp_path)
        for number, key in enumerate(kept):
            with pytest.raises(StoreError, match="the disk is full"):
                store.publish(large(number), replace=True)
            assert store.find(key).metrics() == large(number).metrics()

    kernel.in_child(work)


def test_a_read_only_store_is_read_and_says_what_to_do_when_it_must_write(tmp_path):
    store = Store(tmp_path / "store", report=lambda message: None)
    keys = [store.publish(build_result(number)).key for number in range(3)]
    store.remember_request("d" * 64, keys[0])
    store.list()

    def work():
        kernel.own_mounts()
        kernel.make_read_only(store.path)
        told = []
        read = Store(store.path, report=told.append)
        assert set(read.verify().whole) == set(keys)
        assert {entry.key for entry in read.list()} == set(keys)
        assert [entry.key for entry in read.list(limit=1)] == [keys[2]]
        assert read.find_request("d" * 64) == keys[0]
        for number, key in enumerate(keys):
            assert read.find(key).metrics() == build_result(number).metrics()
            assert read.get(key[:8]).score.shape == (2, 3, 4)
        assert read.export(keys[0], tmp_path / "out.zip").exists()
        for write in (
            lambda: read.publish(build_result(7)),
            lambda: read.lease(keys[0]).try_acquire(),
            lambda: read.gc(keep_latest=0),
            lambda: read.import_from(tmp_path / "out.zip"),
            lambda: read.rebuild(),
        ):
            with pytest.raises(StoreError, match="permission was denied; choose another") as caught:
                write()
            assert "\n" not in str(caught.value)
        assert len(told) <= 1

    kernel.in_child(work)
    assert set(store.verify().whole) == set(keys)


def test_a_damaged_result_on_a_read_only_disk_is_not_served(tmp_path):
    store = Store(tmp_path / "store")
    key = store.publish(build_result(1)).key
    (store.folder(key) / "arrays.safetensors").write_bytes(b"rotten")

    def work():
        kernel.own_mounts()
        kernel.make_read_only(store.path)
        told = []
        read = Store(store.path, report=told.append)
        assert read.find(key) is None
        assert "could not be moved away" in told[0]
        assert list(read.verify().damaged) == [key]

    kernel.in_child(work)


def without_locks(path):
    """A store on a file system that refuses every lock, and what it reports."""
    kernel.refuse_locks()
    with (path / "probe").open("wb") as file, pytest.raises(OSError, match="No locks available"):
        fcntl.lockf(file, fcntl.LOCK_EX)
    connection = sqlite3.connect(path / "probe.sqlite")
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("CREATE TABLE x (y)")
    told = []
    return Store(path / "store", report=told.append), told


def test_a_file_system_without_locks_does_without_the_catalogue(tmp_path):
    def work():
        store, told = without_locks(tmp_path)
        keys = [store.publish(build_result(number)).key for number in range(4)]
        assert [entry.key for entry in store.list()] == keys[::-1]
        assert [entry.key for entry in store.list(limit=2)] == keys[:1:-1]
        assert store.publish(build_result(1, metrics={"n": 5}), replace=True).metrics() == {"n": 5}
        with store.lease(keys[0]) as one, store.lease(keys[0], wait=0) as two:
            assert (one.held, two.held) == (True, False)
        assert len(store.gc(keep_latest=1).removed) == 3
        assert store.verify().whole == (keys[3],)
        assert len(told) == 1
        assert "the catalogue cannot be used" in told[0]

    kernel.in_child(work)


def test_processes_share_a_file_system_without_locks(tmp_path):
    def work():
        store, _ = without_locks(tmp_path)
        writers = [
            kernel.fork.Process(target=lambda n=n: store.publish(build_result(n % 3)))
            for n in range(9)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 9
        assert set(store.verify().whole) == {key_of(number) for number in range(3)}

    kernel.in_child(work)


def test_the_environment_switches_the_catalogue_off(store, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CATALOGUE", "off")
    keys = [store.publish(build_result(number)).key for number in range(3)]
    assert [entry.key for entry in store.list()] == keys[::-1]
    assert store.rebuild() == 3
    assert not store.catalogue.path.exists()
