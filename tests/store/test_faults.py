"""SIGKILL at every step of every write, in a loop: nothing half published, nothing lost."""

import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from workbench.store import files
from workbench.store.pieces import Pieces
from workbench.store.results import Store

fork = multiprocessing.get_context("fork")
SOURCES = Path(files.__file__).parent
PUBLISH = (
    *("after-scratch", "during-arrays", "after-arrays", "during-result", "after-result"),
    *("during-copy", "after-copy", "during-manifest", "after-manifest", "after-sync"),
    *("after-shard", "before-rename", "after-rename", "after-publish"),
)
REPLACE = ("after-scratch", "after-sync", "before-rename", "after-exchange", "after-publish")
REQUEST = ("during-file", "after-file", "after-file-rename")


def killed_at(point, work):
    """Do some work in a process that dies at a point; whether it did."""

    def child():
        os.environ["WORKBENCH_FAULT"] = point
        work()

    process = fork.Process(target=child)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def quiet(store):
    return Store(store.path, report=lambda message: None)


def test_every_fault_point_of_the_source_is_killed_at():
    text = "\n".join(path.read_text("utf-8") for path in SOURCES.glob("*.py"))
    points = set(re.findall(r'fault\("([\w-]+)"\)', text))
    steps = set(re.findall(r'write_durably\([^\n]*"(\w+)"\)', text))
    points |= {f"{when}-{step}" for step in steps for when in ("during", "after")}
    others = {"after-piece", "after-lease", "after-remove", "after-set-aside"}
    assert points == {*PUBLISH, *REPLACE, *REQUEST} | others


def test_killed_at_every_step_of_publishing_again_and_again(store, make_result, tmp_path):
    model = tmp_path / "model.json"
    model.write_text("{}")
    published = {store.publish(make_result(0)).key}
    number = 0
    for _ in range(3):
        for point in PUBLISH:
            number += 1
            result = make_result(number)
            # A file beside it, so that copying is a step too.
            assert killed_at(
                point, lambda r=result: quiet(store).publish(r, files={"model.json": model})
            ), point
            if point in ("after-rename", "after-publish"):
                published.add(result.key)
            found = quiet(store).verify()
            assert set(found.whole) == published, point
            assert (found.damaged, found.unreadable) == ({}, {}), point
    assert {entry.key for entry in store.list()} == published
    for again in range(number + 1):
        assert store.publish(make_result(again)).key in set(store.verify().whole)


def test_killed_at_every_step_of_a_replacement_the_key_always_has_a_result(store, make_result):
    store.publish(make_result(1))
    key = make_result(1).key
    for number, point in enumerate(REPLACE, start=2):
        new = make_result(number, key=key)
        before = store.get(key).metrics()
        assert killed_at(point, lambda r=new: quiet(store).publish(r, replace=True)), point
        found = quiet(store).verify()
        assert (found.whole, found.damaged) == ((key,), {}), point
        changed = point in ("after-exchange", "after-publish")
        assert store.get(key).metrics() == (new.metrics() if changed else before), point


def test_a_system_without_exchange_replaces_in_two_steps(store, make_result, monkeypatch):
    monkeypatch.setattr("workbench.store.shelf.exchange", lambda one, other: False)
    store.publish(make_result(1))
    new = make_result(2, key=make_result(1).key)
    assert store.publish(new, replace=True).metrics() == new.metrics()
    assert store.verify().whole == (new.key,)


def test_exchange_swaps_or_does_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    swapped = files.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "who").read_text() == ("b" if swapped else "a")
    assert not files.exchange(tmp_path / "a", tmp_path / "nowhere")
    assert (tmp_path / "a" / "who").exists()


@pytest.mark.parametrize("point", REQUEST)
def test_a_request_is_remembered_whole_or_not_at_all(store, make_result, point):
    key, request = store.publish(make_result()).key, "d" * 64
    assert killed_at(point, lambda: store.remember_request(request, key))
    assert store.find_request(request) == (key if point == "after-file-rename" else None)


def test_killed_while_removing_a_result_is_gone_and_only_that_one(store, make_result):
    keep, drop = (store.publish(make_result(number)).key for number in (1, 2))
    assert killed_at("after-remove", lambda: store.shelf.remove(drop))
    assert store.verify().whole == (keep,)


def test_killed_while_a_damaged_result_is_set_aside_it_is_not_served(store, make_result):
    keep, bad = (store.publish(make_result(number)).key for number in (1, 2))
    (store.folder(bad) / "arrays.safetensors").write_bytes(b"rotten")
    assert killed_at("after-set-aside", lambda: quiet(store).find(bad))
    assert store.find(bad) is None
    assert store.verify().whole == (keep,)
    assert len(list((store.path / "damaged").iterdir())) == 1


def test_killed_after_a_piece_or_with_a_lease_the_next_goes_on(store, make_result):
    key = make_result().key
    part = {"a": torch.ones(2)}
    work = lambda: Pieces(store.path, key).get_or_compute("batch-0", lambda: part)  # noqa: E731
    assert killed_at("after-piece", work)
    kept = Pieces(store.path, key).get_or_compute("batch-0", lambda: pytest.fail("was kept"))
    assert torch.equal(kept["a"], part["a"])
    assert killed_at("after-lease", lambda: store.lease(key).try_acquire())
    with store.lease(key, wait=0) as lease:
        assert lease.held
