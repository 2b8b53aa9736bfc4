"""Whatever happens to a stored file, nobody is served a wrong number."""

import json

import pytest

from workbench.errors import DamagedResultError, StoreError
from workbench.store.record import NewerResultError


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


DAMAGE = [flip_a_bit, truncate, fill_with_zeros, remove, empty]
FILES = ["arrays.safetensors", "result.json", "manifest.json"]


def rewrite(path, **changes):
    """Change a JSON file and keep it valid."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_reported_set_aside_and_computed_again(
    store, make_result, reports, damage, name
):
    kept = store.publish(make_result())
    damage(kept.path / name)
    assert store.find(kept.key) is None
    assert len(reports) == 1
    assert "it was set aside in" in reports[0]
    assert "\n" not in reports[0]
    assert not kept.path.exists()
    assert len(list((store.path / "damaged").iterdir())) == 1
    store.publish(make_result())
    assert store.find(kept.key).metrics() == kept.metrics()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_never_served_even_when_read_late(store, make_result, damage):
    kept = store.publish(make_result())
    late = store.get(kept.key)
    damage(kept.path / "arrays.safetensors")
    with pytest.raises(DamagedResultError, match="it was set aside in"):
        _ = late.arrays["score"]
    assert store.find(kept.key) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_asking_for_a_damaged_result_by_key_is_an_error_in_one_line(store, make_result, damage):
    kept = store.publish(make_result())
    damage(kept.path / "result.json")
    with pytest.raises(DamagedResultError, match=r"result\.json.* it was set aside"):
        store.get(kept.key)


def test_publishing_over_a_damaged_result_replaces_it(store, make_result, reports):
    kept = store.publish(make_result())
    flip_a_bit(kept.path / "arrays.safetensors")
    store.publish(make_result())
    assert "does not match its SHA-256" in reports[0]
    assert store.verify().whole == (kept.key,)


def test_a_result_of_a_newer_workbench_is_refused_and_left_alone(store, make_result, reports):
    kept = store.publish(make_result())
    rewrite(kept.path / "manifest.json", schema=99)
    for attempt in (store.find, store.get):
        with pytest.raises(NewerResultError, match=r"written by a newer workbench .*upgrade"):
            attempt(kept.key)
    with pytest.raises(NewerResultError):
        store.publish(make_result())
    assert store.list() == []
    assert list(store.verify().unreadable) == [kept.key]
    assert kept.path.is_dir()


@pytest.mark.parametrize(
    "manifest",
    [
        {"schema": "1"},
        {"schema": 0},
        {"files": {}},
        {"files": ["arrays.safetensors", "result.json"]},
        {"files": {"arrays.safetensors": {}, "result.json": {}}},
        {"files": {"arrays.safetensors": 1, "result.json": 2}},
        {"files": {"../../x.json": {"size": 1, "sha256": "a" * 64}}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_damage(store, make_result, reports, manifest):
    kept = store.publish(make_result())
    rewrite(kept.path / "manifest.json", **manifest)
    assert store.find(kept.key) is None
    assert "manifest.json" in reports[0]


@pytest.mark.parametrize("text", ["[]", "nonsense", '{"schema": ', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json_object_is_damage(store, make_result, reports, text):
    kept = store.publish(make_result())
    (kept.path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert store.find(kept.key) is None
    assert "manifest.json" in reports[0]


def test_a_result_under_another_key_is_damage(store, make_result, reports):
    kept = store.publish(make_result(1))
    other = store.folder(make_result(2).key)
    other.parent.mkdir()
    kept.path.rename(other)
    assert store.find(make_result(2).key) is None
    assert "belongs to" in reports[0]


def test_verify_names_what_is_damaged_and_keeps_the_rest(store, make_result):
    keys = [store.publish(make_result(number)).key for number in range(3)]
    truncate(store.folder(keys[1]) / "arrays.safetensors")
    found = store.verify()
    assert set(found.whole) == {keys[0], keys[2]}
    assert list(found.damaged) == [keys[1]]
    assert store.verify().damaged == {}


def test_damaged_results_are_dropped_only_when_asked(store, make_result):
    kept = store.publish(make_result())
    truncate(kept.path / "arrays.safetensors")
    store.verify()
    assert store.gc().leftovers == ()
    assert len(store.gc(damaged=True).leftovers) == 1
    assert list((store.path / "damaged").iterdir()) == []


def test_a_result_removed_while_it_is_read_is_no_damage(store, make_result):
    late = store.publish(make_result())
    store.shelf.remove(late.key)
    with pytest.raises(StoreError, match="was removed while it was in use") as caught:
        _ = late.arrays["score"]
    assert not isinstance(caught.value, DamagedResultError)
    assert store.find(late.key) is None


def test_a_result_that_vanishes_between_two_checks_is_absent(store, make_result, monkeypatch):
    kept = store.publish(make_result())
    is_dir = type(store.path).is_dir
    asked = []

    def vanish(path):
        answer = is_dir(path)
        if path == kept.path and not asked:
            asked.append(path)
            store.shelf.remove(kept.key)
        return answer

    monkeypatch.setattr(type(store.path), "is_dir", vanish)
    assert store.find(kept.key) is None
    assert not is_dir(store.path / "damaged")


def test_a_whole_result_that_was_published_meanwhile_is_put_back(store, make_result):
    kept = store.publish(make_result())
    store.shelf.set_aside(kept.key, DamagedResultError("the result that was here before"))
    assert store.find(kept.key).metrics() == kept.metrics()
