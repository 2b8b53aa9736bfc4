"""A lease keeps two processes from the same work, and outlives no owner."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from workbench.errors import StoreError
from workbench.store.lease import Lease, is_stale, read_owner

KEY = "a" * 64
fork = multiprocessing.get_context("fork")


def test_one_claim_at_a_time(store):
    with store.lease(KEY) as first:
        assert first.held
        with store.lease(KEY, wait=0) as second:
            assert not second.held
        assert first.path.exists()
    assert not first.path.exists()
    with store.lease(KEY, wait=0) as third:
        assert third.held


def test_claims_on_different_keys_do_not_meet(store):
    with store.lease(KEY) as one, store.lease("b" * 64, wait=0) as other:
        assert one.held
        assert other.held


def test_a_second_process_waits_until_the_first_has_published(store, make_result, reports):
    result = make_result()

    def compute():
        time.sleep(0.3)
        store.publish(result)
        first.release()

    first = store.lease(result.key)
    assert first.try_acquire()
    worker = threading.Thread(target=compute)
    worker.start()
    with store.lease(result.key):
        assert store.find(result.key) is not None
    worker.join()
    assert reports == [f"waiting for {reports[0].split('for ', 1)[1]}"]
    assert str(os.getpid()) in reports[0]


def test_a_published_result_ends_the_waiting_although_the_claim_is_held(
    store, make_result, reports
):
    with store.lease(make_result().key):
        store.publish(make_result())
        with store.lease(make_result().key, wait=0.5) as second:
            assert not second.held
    assert reports == []


def test_a_killed_owner_is_noticed_at_once_on_the_same_machine(store):
    def claim():
        store.lease(KEY).try_acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=claim)
    process.start()
    process.join()
    assert (store.path / "leases" / f"{KEY}.json").exists()
    with store.lease(KEY, wait=0) as lease:
        assert lease.held


def test_an_owner_elsewhere_is_given_up_after_missed_beats(store):
    path = store.path / "leases" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
    os.utime(path, (time.time() - 20, time.time() - 20))
    assert not is_stale(path)
    os.utime(path, (time.time() - 40, time.time() - 40))
    assert is_stale(path)
    with store.lease(KEY, wait=0) as lease:
        assert lease.held
        assert read_owner(path)["pid"] == os.getpid()


def test_an_empty_claim_belongs_to_someone_who_is_writing_it(store):
    path = store.path / "leases" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.touch()
    with store.lease(KEY, wait=0) as lease:
        assert not lease.held


def test_a_heartbeat_keeps_a_claim_fresh(store):
    with Lease(store.path / "leases", KEY, beat=0.02) as lease:
        os.utime(lease.path, (1, 1))
        deadline = time.monotonic() + 5
        while lease.path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_claim_that_was_taken_over_is_neither_touched_nor_removed(store):
    with Lease(store.path / "leases", KEY, beat=0.02) as lease:
        lease.path.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
        deadline = time.monotonic() + 5
        while lease.held:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.utime(lease.path, (1, 1))
        time.sleep(0.05)
        assert lease.path.stat().st_mtime == 1
    assert lease.path.exists()


def test_many_threads_that_find_an_abandoned_claim_give_it_to_one(store):
    path = store.path / "leases" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
    os.utime(path, (1, 1))
    leases = [store.lease(KEY) for _ in range(8)]
    threads = [threading.Thread(target=lease.try_acquire) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner = read_owner(path)["owner"]
    assert [lease._owner for lease in leases if lease.held and lease._is_ours()] == [owner]
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_claim_in_a_place_that_cannot_be_written_is_one_line(store):
    store.path.parent.mkdir(exist_ok=True)
    store.path.write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        store.lease(KEY).try_acquire()
