"""A store as it was, a verb, and what must hold however far the verb came."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.store.conftest import build_result, key_of
from workbench.store.results import Store

OLD, NEW, OTHER, MORE = 1, 2, 3, 4
REQUEST = "d" * 64


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
