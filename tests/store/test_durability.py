"""Killed, out of space, or raced by another process: a store holds whole results or nothing."""

import errno
import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest

from workbench.errors import StoreError
from workbench.store import files
from workbench.store.results import Store

BEFORE_RENAME = [
    "after-scratch",
    "during-arrays",
    "after-arrays",
    "during-result",
    "after-result",
    "during-manifest",
    "after-manifest",
    "before-rename",
]
fork = multiprocessing.get_context("fork")


def publish_in_child(path, result, fault=None, **options):
    """Publish in a process that dies at a fault point; returns its exit code."""

    def work():
        if fault:
            os.environ["WORKBENCH_FAULT"] = fault
        Store(path, report=lambda message: None).publish(result, **options)

    process = fork.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_what_a_killed_process_left_is_collected_once_it_is_old(store, make_result):
    publish_in_child(store.path, make_result(), "after-arrays")
    (left,) = (store.path / "temp").iterdir()
    assert store.gc().leftovers == ()
    for path in (*left.iterdir(), left):
        os.utime(path, (1, 1))
    assert store.gc(dry_run=True).leftovers == (f"temp/{left.name}",)
    assert left.exists()
    assert store.gc().freed_bytes > 0
    assert list((store.path / "temp").iterdir()) == []


@pytest.mark.parametrize("point", BEFORE_RENAME)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(store, make_result, monkeypatch, point):
    kept = store.publish(make_result(1))
    monkeypatch.setenv("WORKBENCH_FAULT", f"{point}:ENOSPC")
    with pytest.raises(StoreError, match=r"cannot write .*: the disk is full") as caught:
        store.publish(make_result(2))
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("WORKBENCH_FAULT")
    assert list((store.path / "temp").iterdir()) == []
    assert store.verify().whole == (kept.key,)


@pytest.mark.parametrize("error", ["EROFS", "EACCES"])
def test_a_store_that_cannot_be_written_says_what_to_do(store, make_result, monkeypatch, error):
    monkeypatch.setenv("WORKBENCH_FAULT", f"after-scratch:{error}")
    with pytest.raises(StoreError, match=r"permission was denied; choose another with --store"):
        store.publish(make_result())


def test_a_file_size_limit_stops_a_real_write_cleanly(store, make_result):
    large = make_result(arrays={"a": np.zeros(100_000)})

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            store.publish(large)
        except StoreError as error:
            os._exit(7 if "the disk is full" in str(error) else 8)

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 7
    assert list((store.path / "temp").iterdir()) == []
    assert store.find(large.key) is None


def test_every_file_and_folder_reaches_the_disk_before_the_rename(store, make_result, monkeypatch):
    log = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(name_of(descriptor)))
    monkeypatch.setattr(files, "fault", lambda point: None)
    rename = type(store.path).rename
    monkeypatch.setattr(
        type(store.path), "rename", lambda self, to: log.append("rename") or rename(self, to)
    )
    store.publish(make_result())
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert {"arrays.safetensors", "result.json", "manifest.json"} <= set(before)
    assert any(name.startswith(make_result().key[:16]) for name in before)
    assert after == [make_result().key[:2]]


def name_of(descriptor):
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH119, PTH115


def test_processes_that_publish_one_key_at_once_all_end_with_a_whole_result(store, make_result):
    results = [make_result(0, metrics={"n": float(number)}) for number in range(4)]
    workers = [
        fork.Process(target=lambda result=result: Store(store.path).publish(result))
        for result in results
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert store.verify().whole == (results[0].key,)
    assert list((store.path / "temp").iterdir()) == []


def test_an_operating_system_error_we_do_not_know_is_still_one_line(store):
    with (
        pytest.raises(StoreError, match=r"cannot read .*: input/output error; check the path"),
        files.explained("read", store.path),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
