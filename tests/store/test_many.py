"""Many processes on one key; a job under way while somebody cleans up; every bit of every file."""

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest

import workbench as wb
from tests.scripts import benchmarks
from tests.store.conftest import build_result, key_of
from tests.zoo import random_tokens, tiny_model
from workbench.errors import DamagedResultError, StoreError
from workbench.run import Reporter
from workbench.store import shelf as shelf_module
from workbench.store.record import NewerResultError
from workbench.store.results import Store
from workbench.store.shelf import Shelf

fork = multiprocessing.get_context("fork")
N_PROCESSES = 16


def run_all(works):
    """Start them all, wait for all; their exit codes."""
    processes = [fork.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_sixteen_processes_on_one_key_compute_it_once(store, tmp_path):
    result = build_result(1)

    def work():
        with store.lease(result.key):
            if store.find(result.key) is None:
                (tmp_path / f"computed-{os.getpid()}").touch()
                time.sleep(0.2)
                store.publish(result)
        assert store.find(result.key).metrics() == result.metrics()

    assert run_all([work] * N_PROCESSES) == [0] * N_PROCESSES
    assert len(list(tmp_path.glob("computed-*"))) == 1
    assert list((store.path / "leases").iterdir()) == []
    assert list((store.path / "temp").iterdir()) == []


def test_when_owners_are_killed_others_take_over_and_one_result_is_left(store, tmp_path):
    result = build_result(1)

    def work(index):
        with store.lease(result.key):
            if store.find(result.key) is None:
                (tmp_path / f"computed-{index}").touch()
                if len(list(tmp_path.glob("computed-*"))) <= 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                store.publish(result)

    codes = run_all([lambda index=index: work(index) for index in range(N_PROCESSES)])
    assert sorted(codes) == [-9] * 3 + [0] * (N_PROCESSES - 3)
    assert len(list(tmp_path.glob("computed-*"))) == 4
    assert store.verify().whole == (result.key,)


def test_sixteen_processes_that_ask_for_no_lease_leave_one_whole_result(store):
    results = [build_result(0, metrics={"n": float(number)}) for number in range(N_PROCESSES)]
    works = [lambda result=result: store.publish(result) for result in results]
    works[1::4] = [lambda r=r: store.publish(r, replace=True) for r in results[1::4]]
    assert run_all(works) == [0] * N_PROCESSES
    assert store.verify().whole == (key_of(0),)
    assert store.get(key_of(0)).metrics()["n"] in range(N_PROCESSES)
    assert list((store.path / "temp").iterdir()) == []


def test_gc_removes_nothing_that_a_running_job_needs(tmp_path):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(8, 12)
    expected = wb.run("attention-sinks", model, tokens, batch_size=1)
    removed = []

    def clean(done, total):
        # The worst that can be asked for, in the middle of the job, with its parts long untouched.
        store = Store(tmp_path)
        for folder in ("pieces", "temp"):
            for path in [*(tmp_path / folder).rglob("*")]:
                os.utime(path, (1, 1))
        found = store.gc(keep_latest=0, older_than=0, damaged=True)
        removed.extend([*found.removed, *found.leftovers])
        if done:
            assert list((tmp_path / "pieces" / expected.key).iterdir())

    reporter = Reporter(progress=clean)
    kept = wb.run("attention-sinks", model, tokens, store=tmp_path, batch_size=1, reporter=reporter)
    assert removed == []
    assert kept.metrics() == expected.metrics()
    assert Store(tmp_path).find(kept.key) is not None


def test_gc_beside_writers_takes_whole_results_only(tmp_path):
    store = Store(tmp_path / "store", report=lambda message: None)

    def write():
        for number in range(12):
            store.publish(build_result(number))

    def clean():
        for _ in range(12):
            store.gc(keep_latest=2)

    assert run_all([write, clean, write, clean]) == [0] * 4
    found = store.verify()
    assert (found.damaged, found.unreadable) == ({}, {})
    assert list((store.path / "temp").iterdir()) == []


def outcome(store, key, expected):
    """``same``, ``refused`` or ``newer``; a number that differs is an error."""
    try:
        found = store.find(key)
        if found is None:
            return "refused"
        assert found.metrics() == expected.metrics()
        np.testing.assert_array_equal(found.arrays["score"], expected.arrays["score"])
    except NewerResultError:
        return "newer"
    except StoreError as error:
        return "refused" if "\n" not in str(error) else "said in several lines"
    return "same"


def each_damage(content, every):
    """One bit of every ``every``-th byte turned, cuts, and zeros from there on."""
    for at in range(0, len(content), every):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        yield bytes(flipped)
        yield content[:at]
        if any(content[at:]):
            yield content[:at] + bytes(len(content) - at)


@pytest.mark.parametrize("name", ["arrays.safetensors", "result.json", "manifest.json"])
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_cut_or_zeroed_file_is_served(store, name, every):
    expected = build_result(3)
    kept = store.publish(expected)
    path = kept.path / name
    content = path.read_bytes()
    found = Counter()
    for damaged in each_damage(content, every):
        path.write_bytes(damaged)
        found[outcome(Store(store.path, report=lambda text: None), kept.key, expected)] += 1
        aside = list((store.path / "damaged").glob("*"))
        if aside:
            aside[0].rename(kept.path)
        path.write_bytes(content)
    assert set(found) <= {"refused", "newer"}
    assert found["refused"] > 0
    assert found["newer"] <= (4 if name == "manifest.json" else 0)


def test_a_flipped_bit_in_the_catalogue_never_changes_what_is_listed(store):
    """A flip in a name that SQLite filters by may hide a row from that list, until all are asked for."""
    for number in range(8):
        store.publish(build_result(number))
    time.sleep(2.1)  # else every shard is looked through again, and nothing is read from the rows
    expected = store.list()
    content = store.catalogue.path.read_bytes()
    asked = []
    for at in range(0, len(content), 61):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        store.catalogue.path.write_bytes(flipped)
        seen = Store(store.path, report=asked.append)
        some = seen.list("attention-sinks", "demo", limit=5)
        assert [entry for entry in expected if entry in some] == some, at
        assert seen.list() == expected, at
        seen.catalogue.discard()
    assert asked  # some flips hit something that matters, and were told


def test_a_flip_in_a_request_or_a_claim_is_no_answer(store):
    key = store.publish(build_result(1)).key
    store.remember_request("d" * 64, key)
    path = store.path / "requests" / "dd" / ("d" * 64)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert store.find_request("d" * 64) is None


@pytest.mark.slow
def test_a_hundred_thousand_results_are_listed_and_found_right(tmp_path):
    with benchmarks() as module:
        bench = module("store")
    fill, key_of, small_result = bench.fill, bench.key_of, bench.small_result

    n = 100_000
    store = Store(tmp_path / "store", report=pytest.fail)
    fill(store, range(n))
    assert store.rebuild() == n
    listed = store.list()
    assert [entry.key for entry in listed] == [key_of(number) for number in reversed(range(n))]
    assert [entry.metrics["number"] for entry in store.list(limit=3)] == [n - 1, n - 2, n - 3]
    some = store.list(bench.PROBES[2], "model-2", limit=7)
    assert [entry.metrics["number"] for entry in some] == [n - 18 - 20 * k for k in range(7)]
    assert store.get(key_of(77_777)[:16]).metrics() == small_result(77_777).metrics()
    store.publish(small_result(n))
    assert store.list(limit=1)[0].key == key_of(n)
    store.shelf.remove(key_of(n))
    assert len(store.list()) == n


def test_a_result_that_gc_takes_at_once_is_published_again(tmp_path, monkeypatch):
    store, real, looks = Store(tmp_path), Shelf.read, []

    def taken_once(shelf, key, *, deep):
        looks.append(key)
        if len(looks) == 1:
            shutil.rmtree(shelf.folder(key))
        return real(shelf, key, deep=deep)

    monkeypatch.setattr(Shelf, "read", taken_once)
    result = build_result(1)
    assert store.publish(result).metrics() == result.metrics()
    assert len(looks) == 2
    assert store.find(result.key) is not None


def test_a_result_that_is_replaced_between_two_files_is_read_again(tmp_path, monkeypatch):
    told = []
    store, real = Store(tmp_path, report=told.append), shelf_module.read_record
    store.publish(build_result(1, metrics={"v": 1.0}))
    other = Store(tmp_path)

    def replaced_once(folder, key):
        monkeypatch.setattr(shelf_module, "read_record", real)
        other.publish(build_result(1, metrics={"v": 22.0}), replace=True)
        raise DamagedResultError("the manifest of one and the numbers of another")

    monkeypatch.setattr(shelf_module, "read_record", replaced_once)
    assert store.find(key_of(1)).metrics() == {"v": 22.0}
    assert told == []
    assert not list(tmp_path.glob("damaged/*"))
