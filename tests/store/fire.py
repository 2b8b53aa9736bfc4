"""A store under fire: what each verb may leave behind when it is killed, at every step of it.

A scenario is a store as it was, a verb, and what must hold however far the verb came. The verb is
run in a process of its own, which is killed with SIGKILL

* at every fault point that the verb passes (``WORKBENCH_FAULT``), and
* before every operation of it on the file system, as the interpreter's audit events tell them; so
  that a step nobody put a fault point at is killed at as well.

After each kill the store is looked at by a new process's eyes, and the verb is run again, to its end.

    python -m tests.store.fire --rounds 20 -o faults.json
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.store.conftest import build_result, key_of
from workbench.errors import DamagedResultError
from workbench.store.lease import Lease
from workbench.store.results import Store

fork = multiprocessing.get_context("fork")
OLD, NEW, OTHER, MORE = 1, 2, 3, 4
REQUEST = "d" * 64
MEMORY = Path("/dev/shm")
"""A file system that need not wait for a disk."""
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime")


def replacement():
    """Another result under the key of the old one."""
    return build_result(OLD, metrics={"n": 99.0})


def quiet(store):
    """The store, seen afresh."""
    return Store(store.path, report=lambda message: None)


@dataclass
class World:
    """What a verb works on."""

    root: Path
    store: Store = field(init=False)

    def __post_init__(self):
        self.store = Store(self.root / "store", report=lambda message: None)

    def path(self, name):
        """A file or folder outside the store."""
        return self.root / name


def kept(world, number):
    """Whether a result is there whole, with its own numbers; wrong numbers are an error."""
    found = quiet(world.store).find(key_of(number))
    if found is None:
        return False
    assert found.metrics() == build_result(number).metrics()
    assert (found.arrays["score"] == build_result(number).arrays["score"]).all()
    return True


@dataclass(frozen=True)
class Scenario:
    """One verb under fire."""

    name: str
    work: Callable[[World], object]
    check: Callable[[World, bool], None]
    """Given the world and whether the verb came to its end."""
    prepare: Callable[[World], object] = lambda world: None
    stays: tuple[int, ...] = (OTHER,)
    """Results that were published before and that the verb has nothing to do with."""
    rotten: tuple[int, ...] = ()
    """Results that were damaged before, and that a verb which did not end may not have met."""

    def make(self, root):
        """The world before the verb."""
        world = World(root)
        for number in self.stays:
            world.store.publish(build_result(number))
        self.prepare(world)
        return world

    def verify(self, world, finished):
        """Nothing half published, nothing published lost, and the verb's own promise."""
        found = quiet(world.store).verify()
        allowed = {key_of(number) for number in self.rotten if not finished}
        assert set(found.damaged) <= allowed, found.damaged
        assert found.unreadable == {}
        for number in self.stays:
            assert kept(world, number), "a published result was lost"
        self.check(world, finished)
        listed = {entry.key for entry in quiet(world.store).list()}
        assert listed == set(found.whole) == set(quiet(world.store).verify().whole)


# Killing


def _arm(root, number, connection):
    """Die before the ``number``-th change of the file system under ``root``; tell fault points."""
    count, points, prefix = 0, [], os.fspath(root)

    def listen(event, arguments):
        nonlocal count
        if event == "workbench.fault":
            points.append(arguments[0])
            return
        opened = event == "open" and not isinstance(arguments[0], int)
        if not opened and event not in CHANGES:
            return
        if opened and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if not os.fsdecode(arguments[0]).startswith((prefix, *RELATIVE)):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
    return points


RELATIVE = ("arrays.", "result.", "manifest.")
"""Names that ``shutil.rmtree`` removes relative to an open folder."""


def run_and_kill(scenario, world, *, event=0, point=None):
    """Run a verb in a process that may be killed; whether it was, and the points it passed."""
    here, there = fork.Pipe(duplex=False)

    def child():
        points = _arm(world.root, event, there)
        if point is not None:
            os.environ["WORKBENCH_FAULT"] = point
        scenario.work(world)
        there.send(points)

    process = fork.Process(target=child)
    process.start()
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    assert killed or process.exitcode == 0, f"{scenario.name} ended with {process.exitcode}"
    return killed, here.recv() if here.poll() else []


@dataclass
class Tally:
    """What was done to a scenario and what came of it."""

    kills: int = 0
    points: set[str] = field(default_factory=set)
    seconds: float = 0.0


def under_fire(scenario, root):
    """Kill a verb at every step of it, once each; every check that fails raises."""
    tally, start = Tally(), time.perf_counter()

    def attempt(name, **how):
        world = scenario.make(root / f"{scenario.name}-{name}")
        killed, points = run_and_kill(scenario, world, **how)
        scenario.verify(world, not killed)
        if killed:
            tally.kills += 1
            again = run_and_kill(scenario, world)[1]
            scenario.verify(world, True)
            points = points or again
        shutil.rmtree(world.root)
        return killed, points

    number, killed = 0, True
    while killed:
        number += 1
        killed, points = attempt(number, event=number)
    for point in dict.fromkeys(points):
        assert attempt(point, point=point)[0], f"{scenario.name} did not reach {point}"
        tally.points.add(point)
    tally.seconds = time.perf_counter() - start
    return tally


# The verbs


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


def main():
    """Fire at every scenario some rounds and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, default=None)
    arguments = parser.parse_args()
    # A kill loses nothing that was written; only a power cut would. Order is tested elsewhere.
    os.fsync = lambda descriptor: None
    table = {}
    for scenario in SCENARIOS:
        tallies = []
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
            for _ in range(arguments.rounds):
                tallies.append(under_fire(scenario, Path(root)))
        kills = sum(tally.kills for tally in tallies)
        points = sorted(set().union(*(tally.points for tally in tallies)))
        table[scenario.name] = {"kills": kills, "survived": kills, "lost": 0, "points": points}
        print(
            f"{scenario.name:24s} {kills:6d} kills, {len(points):2d} fault points, 0 lost",
            flush=True,
        )
    total = sum(row["kills"] for row in table.values())
    print(f"{total} kills, {total} survived, 0 lost (a loss raises)")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"kills": total, "scenarios": table}, indent=1))


if __name__ == "__main__":
    main()
