"""The list is right with the catalogue, without it, and whatever state it is in."""

import multiprocessing
import shutil
import sqlite3

import pytest

from workbench.store.results import Store


@pytest.fixture
def filled(store, make_result):
    for number in range(4):
        model = {"name": "gpt2", "revision": "x"} if number % 2 else "demo"
        provenance = {"model": model, "created": f"2026-01-01T00:00:0{number}+00:00"}
        probe = "attention-sinks" if number < 3 else "reachability"
        store.publish(make_result(number, probe=probe, provenance=provenance))
    return store


def break_catalogue(store, monkeypatch, how):
    path = store.catalogue.path
    store.list()
    if how == "deleted":
        path.unlink()
    elif how == "garbage":
        store.catalogue.discard()
        path.write_bytes(b"not a database at all" * 100)
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[100:4000] = bytes(3900)
        store.catalogue.discard()
        path.write_bytes(data)
    elif how == "a folder":
        store.catalogue.discard()
        path.mkdir()
    elif how == "a senseless row":
        connection = sqlite3.connect(path)
        connection.execute("UPDATE results SET metrics = '[1' WHERE rowid = 2")
        connection.commit()
        connection.close()
    elif how == "newer":
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    elif how == "locked":

        def refuse(*arguments, **options):
            raise sqlite3.OperationalError("database is locked")

        monkeypatch.setattr(sqlite3, "connect", refuse)


BROKEN = ["fine", "deleted", "garbage", "flipped", "a senseless row", "a folder", "newer", "locked"]


@pytest.mark.parametrize("how", BROKEN)
def test_the_list_is_the_same_whatever_the_catalogue(filled, make_result, monkeypatch, how):
    break_catalogue(filled, monkeypatch, how)
    numbers = [make_result(number).key for number in (3, 2, 1, 0)]
    assert [entry.key for entry in filled.list()] == numbers
    assert [entry.key for entry in filled.list(limit=2)] == numbers[:2]
    assert [entry.key for entry in filled.list(model="gpt2")] == [numbers[0], numbers[2]]
    assert [entry.key for entry in filled.list(probe="attention-sinks", model="demo")] == [
        numbers[1],
        numbers[3],
    ]
    assert filled.list(probe="reachability")[0].metrics == make_result(3).metrics()


@pytest.mark.parametrize("how", BROKEN[2:])
def test_a_broken_catalogue_is_mentioned_once(filled, reports, monkeypatch, how):
    break_catalogue(filled, monkeypatch, how)
    filled.list()
    filled.list()
    assert len(reports) == 1
    assert "catalogue" in reports[0]


@pytest.mark.parametrize("how", ["garbage", "flipped"])
def test_a_damaged_catalogue_works_again_afterwards(filled, reports, monkeypatch, how):
    break_catalogue(filled, monkeypatch, how)
    filled.list()
    again = Store(filled.path, report=reports.append)
    assert len(again.list()) == 4
    assert len(reports) == 1


def test_processes_that_list_a_store_for_the_first_time_do_not_disturb_each_other(filled):
    fork = multiprocessing.get_context("fork")

    def look():
        # A report would come from an exception here: exit code 1.
        assert len(Store(filled.path, report=pytest.fail).list()) == 4

    workers = [fork.Process(target=look) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6


def test_the_list_follows_what_is_added_removed_and_replaced(filled, make_result):
    assert len(filled.list()) == 4
    filled.publish(make_result(7))
    filled.shelf.remove(make_result(0).key)
    filled.publish(make_result(1, metrics={"sink_rate": 0.75}), replace=True)
    shutil.rmtree(filled.folder(make_result(2).key))
    entries = {entry.key: entry.metrics for entry in filled.list()}
    assert set(entries) == {make_result(number).key for number in (1, 3, 7)}
    assert entries[make_result(1).key] == {"sink_rate": 0.75}


def test_an_up_to_date_catalogue_answers_without_reading_results(filled, monkeypatch):
    before = filled.list()
    monkeypatch.setattr(filled, "entry", pytest.fail)
    assert filled.list() == before


def test_rebuild_makes_the_catalogue_from_the_results(filled):
    filled.list()
    connection = sqlite3.connect(filled.catalogue.path)
    connection.execute("UPDATE results SET probe = 'wrong'")
    connection.commit()
    connection.close()
    assert filled.rebuild() == 4
    assert {entry.probe for entry in filled.list()} == {"attention-sinks", "reachability"}


def test_a_time_without_a_zone_or_sense_still_sorts(store, make_result):
    for number, created in enumerate(["2026-01-01 10:00", "0001-01-01T00:00+14:00", "x", 5, None]):
        store.publish(make_result(number, provenance={"created": created}))
    times = [entry.created for entry in store.list()]
    assert times == sorted(times, reverse=True)
    assert len(times) == 5
