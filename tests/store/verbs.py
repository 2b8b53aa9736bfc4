"""The verbs of a store that are put under fire, and what each of them promises."""

import os
import shutil
import tarfile
import time
import zipfile

from tests.store.conftest import build_result, key_of
from tests.store.scenario import MORE, NEW, OLD, OTHER, REQUEST, Scenario, kept, quiet, replacement
from workbench.errors import DamagedResultError
from workbench.store.lease import Lease
from workbench.store.results import Store


def _publish(world):
    world.path("model.json").write_text("{}")
    quiet(world.store).publish(build_result(NEW), files={"model.json": world.path("model.json")})


def _all_or_nothing(*numbers):
    def check(world, finished):
        assert all(kept(world, number) for number in numbers) or not finished

    return check


def _old_or_new(world, finished):
    metrics = quiet(world.store).get(key_of(OLD)).metrics()
    assert metrics in ([replacement().metrics()] if finished else _EITHER)


_EITHER = [build_result(OLD).metrics(), replacement().metrics()]


def _replace(world):
    quiet(world.store).publish(replacement(), replace=True)


def _replace_in_two_moves(world):
    from workbench.store import shelf

    shelf.exchange = lambda one, other: False
    _replace(world)


def _damage(world, number=NEW):
    store = world.store
    store.publish(build_result(number))
    (store.folder(key_of(number)) / "arrays.safetensors").write_bytes(b"rotten")


def _mend(world):
    store = quiet(world.store)
    if store.find(key_of(NEW)) is None:
        store.publish(build_result(NEW))


def _set_aside_by_mistake(world):
    """Another process published between the check that failed and the move."""
    if quiet(world.store).find(key_of(OLD)) is not None:
        world.store.shelf.set_aside(key_of(OLD), DamagedResultError("what was here before"))


def _age(*paths):
    for path in paths:
        for part in (*path.rglob("*"), path):
            os.utime(part, (1, 1))


def _leave_things(world):
    store = world.store
    for name in ("temp/left", f"pieces/{key_of(9)}"):
        (store.path / name).mkdir(parents=True)
        (store.path / name / "arrays.safetensors").write_bytes(b"x")
    (store.path / "leases").mkdir(exist_ok=True)
    claim = store.path / "leases" / f"{key_of(9)}.json"
    claim.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
    store.remember_request(REQUEST, key_of(9))
    _age(store.path / "temp/left", store.path / "pieces" / key_of(9), claim)


def _gone_or_whole(world, finished):
    present = [kept(world, number) for number in (OLD, NEW)]
    assert not finished or not any(present)


def _collect(world):
    store = quiet(world.store)
    store.gc(keep_latest=1)


def _archive(world):
    source = Store(world.path("source"))
    for number in (NEW, MORE):
        source.publish(build_result(number))
    with tarfile.open(world.path("source.tar"), "w") as archive:
        archive.add(source.path / "results", "results")


def _export(name):
    def work(world):
        if not world.path(name).exists():
            quiet(world.store).export(key_of(OTHER), world.path(name))

    return work


def _exported_whole(name):
    def check(world, finished):
        target = world.path(name)
        if not target.exists():
            assert not finished
            return
        if target.suffix:
            assert zipfile.ZipFile(target).testzip() is None
        fresh = Store(world.path(f"fresh-{time.monotonic_ns()}"))
        assert fresh.import_from(target).added == (key_of(OTHER),)
        shutil.rmtree(fresh.path)

    return check


def _remembered(world, finished):
    found = quiet(world.store).find_request(REQUEST)
    assert found in ((key_of(OTHER),) if finished else (None, key_of(OTHER)))


def _pieces(world):
    # Imported here: a process without torch forks several times faster.
    from workbench.store.pieces import Pieces

    return Pieces(world.store.path, key_of(NEW))


def _piece(world, finished=False):
    import torch

    def compute():
        assert not finished, "a kept part was computed again"
        return {"a": torch.arange(6.0)}

    found = _pieces(world).get_or_compute("batch-0", compute)
    assert torch.equal(found["a"], torch.arange(6.0))


def _draft(number):
    def write(world, finished=False):
        import torch

        _pieces(world).write_draft("batch-0", {"a": torch.full((6,), float(number))})

    return write


def _old_or_new_draft(world, finished):
    found = _pieces(world).read_draft("batch-0")
    assert found is not None, "the note before is lost"
    assert found["a"].tolist() in ([[2.0] * 6] if finished else [[1.0] * 6, [2.0] * 6])


def _lose_sight(world):
    """A whole result where a crash may leave it: set aside by mistake, or moved for another."""
    store = world.store
    for number, place in (
        (OLD, f"damaged/{key_of(OLD)}-1"),
        (NEW, f"temp/replaced-x/{key_of(NEW)}"),
    ):
        store.publish(build_result(number))
        (store.path / place).parent.mkdir(parents=True, exist_ok=True)
        store.folder(key_of(number)).rename(store.path / place)


def _both_are_back(world, finished):
    assert all(kept(world, number) for number in (OLD, NEW))


def _claim(world):
    with Lease(world.store.path / "leases", key_of(NEW), wait=5, beat=0.05):
        pass


def _can_be_claimed(world, finished):
    with Lease(world.store.path / "leases", key_of(NEW), wait=5, beat=0.05) as lease:
        assert lease.held


def _abandoned_claim(world):
    (world.store.path / "leases").mkdir()
    claim = world.store.path / "leases" / f"{key_of(NEW)}.json"
    claim.write_text('{"owner": "x", "host": "elsewhere", "pid": 1}')
    _age(claim)


def _nothing_more(world, finished):
    return None


SCENARIOS = [
    Scenario("publish", _publish, _all_or_nothing(NEW)),
    Scenario(
        "replace", _replace, _old_or_new, lambda world: world.store.publish(build_result(OLD))
    ),
    Scenario(
        "replace in two moves",
        _replace_in_two_moves,
        _old_or_new,
        lambda world: world.store.publish(build_result(OLD)),
    ),
    Scenario("mend a damaged result", _mend, _all_or_nothing(NEW), _damage, rotten=(NEW,)),
    Scenario(
        "set aside by mistake",
        _set_aside_by_mistake,
        _nothing_more,
        stays=(OTHER, OLD),
    ),
    Scenario(
        "gc of results",
        _collect,
        _gone_or_whole,
        lambda world: [world.store.publish(build_result(number)) for number in (OLD, NEW)],
    ),
    Scenario(
        "gc of leftovers", lambda world: quiet(world.store).gc(), _nothing_more, _leave_things
    ),
    Scenario(
        "import an archive",
        lambda world: quiet(world.store).import_from(world.path("source.tar")),
        _all_or_nothing(NEW, MORE),
        _archive,
    ),
    Scenario(
        "import a store",
        lambda world: quiet(world.store).import_from(world.path("source")),
        _all_or_nothing(NEW, MORE),
        _archive,
    ),
    Scenario("export a zip", _export("out.zip"), _exported_whole("out.zip")),
    Scenario("export a folder", _export("out"), _exported_whole("out")),
    Scenario(
        "remember a request",
        lambda world: world.store.remember_request(REQUEST, key_of(OTHER)),
        _remembered,
    ),
    Scenario(
        "put back what was lost",
        lambda world: quiet(world.store).verify(),
        _both_are_back,
        _lose_sight,
    ),
    Scenario("claim", _claim, _can_be_claimed),
    Scenario("take an abandoned claim", _claim, _can_be_claimed, _abandoned_claim),
    Scenario("rebuild", lambda world: quiet(world.store).rebuild(), _nothing_more),
    Scenario("keep a part", _piece, _piece),
    Scenario("note where a part stands", _draft(2), _old_or_new_draft, _draft(1)),
    Scenario(
        "forget the parts",
        lambda world: _pieces(world).discard(),
        lambda world, finished: _piece(world),
        _piece,
    ),
]
