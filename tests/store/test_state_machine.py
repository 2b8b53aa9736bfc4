"""Whatever is done to a store, in whatever order, it answers as a dict would.

``python -m tests.store.test_state_machine 500`` runs more examples, each of 40 steps.
"""

import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.store import fire
from tests.store.conftest import build_result, key_of
from tests.store.scenario import Scenario, World
from workbench.store.results import Store

NUMBERS = st.integers(0, 3)
FILES = st.sampled_from(["arrays.safetensors", "result.json", "manifest.json"])
VERBS = ("publish", "replace", "remove", "gc", "remember", "rebuild")
done = Counter()


def flip(content, at):
    changed = bytearray(content)
    changed[at % len(content)] ^= 1 << at % 8
    return bytes(changed)


DAMAGES = {
    "flip": flip,
    "cut": lambda content, at: content[: at % len(content)],
    "zero": lambda content, at: bytes(len(content)),
}


class StoreAgainstDict(RuleBasedStateMachine):
    """The model is a dict from key to the one metric of its result."""

    @initialize()
    def open(self):
        self.root = Path(tempfile.mkdtemp(dir=fire.MEMORY if fire.MEMORY.is_dir() else None))
        self.model = {}
        self.look_again()

    @rule()
    def look_again(self):
        """Another process: nothing in memory is left of what went before."""
        self.store = Store(self.root / "store", report=lambda message: None)

    @rule(number=NUMBERS, value=st.floats(allow_nan=False), replace=st.booleans())
    def put(self, number, value, replace):
        kept = self.store.publish(build_result(number, metrics={"v": value}), replace=replace)
        if replace or kept.key not in self.model:
            self.model[kept.key] = value
        assert kept.metrics() == {"v": self.model[kept.key]}
        done["put"] += 1

    @rule(number=NUMBERS)
    def get(self, number):
        key = key_of(number)
        found = self.store.find(key)
        assert (None if found is None else found.metrics()["v"]) == self.model.get(key)
        if found is not None:
            assert (found.arrays["score"] == build_result(number).arrays["score"]).all()
            assert self.store.get(key[:8]).metrics() == found.metrics()
        done["get"] += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), name=FILES, how=st.sampled_from(sorted(DAMAGES)), at=st.integers(0, 9999))
    def corrupt(self, data, name, how, at):
        key = data.draw(st.sampled_from(sorted(self.model)))
        path = self.store.folder(key) / name
        content = path.read_bytes()
        path.write_bytes(DAMAGES[how](content, at))
        if "newer workbench" in (self.store.verify().unreadable.get(key) or ""):
            # A flip made the schema a later one: refused, and left alone.
            path.write_bytes(content)
            return
        assert self.store.find(key) is None
        del self.model[key]
        done["corrupt"] += 1

    @rule(
        number=NUMBERS, verb=st.sampled_from(VERBS), event=st.integers(1, 25), value=st.integers()
    )
    def kill(self, number, verb, event, value):
        key, new = key_of(number), build_result(number, metrics={"v": value})
        work = {
            "publish": lambda world: world.store.publish(new),
            "replace": lambda world: world.store.publish(new, replace=True),
            "remove": lambda world: world.store.shelf.remove(key),
            "gc": lambda world: world.store.gc(keep_latest=1),
            "remember": lambda world: world.store.remember_request("d" * 64, key),
            "rebuild": lambda world: world.store.rebuild(),
        }[verb]
        scenario = Scenario(verb, work, lambda world, finished: None)
        killed, _ = fire.run_and_kill(scenario, World(self.root), event=event)
        found = {entry.key: entry.metrics["v"] for entry in self.store.list()}
        verified = self.store.verify()
        assert (verified.damaged, verified.unreadable) == ({}, {})
        assert set(verified.whole) == set(found)
        allowed = dict(self.model)
        if verb == "publish" and key not in self.model and key in found:
            allowed[key] = float(value)
        if verb == "replace" and found.get(key) == float(value):
            allowed[key] = float(value)
        if verb == "remove" and key not in found:
            allowed.pop(key, None)
        if verb == "gc":
            newest = [key_of(number) for number in range(4) if key_of(number) in allowed][-1:]
            allowed = {k: v for k, v in allowed.items() if k in found or k in newest}
        assert found == allowed
        if not killed:
            self.check_end(verb, key, float(value), found)
        self.model = allowed
        done["kill"] += killed

    def check_end(self, verb, key, value, found):
        """What a verb that was not killed has done."""
        assert {
            "publish": lambda: key in found,
            "replace": lambda: found[key] == value,
            "remove": lambda: key not in found,
            "gc": lambda: len(found) <= 1,
            "remember": lambda: (
                self.store.find_request("d" * 64) == (key if key in found else None)
            ),
            "rebuild": lambda: True,
        }[verb]()

    @rule(
        number=NUMBERS,
        values=st.lists(st.integers(), min_size=2, max_size=3),
        replace=st.booleans(),
    )
    def several_writers(self, number, values, replace):
        key = key_of(number)
        writers = [
            fire.fork.Process(
                target=lambda value=value: self.store.publish(
                    build_result(number, metrics={"v": value}), replace=replace
                )
            )
            for value in values
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * len(values)
        found = self.store.find(key).metrics()["v"]
        if key in self.model and not replace:
            assert found == self.model[key]
        else:
            assert found in [float(value) for value in values]
        self.model[key] = found
        done["two writers"] += 1

    @rule(keep=st.integers(0, 3))
    def collect(self, keep):
        for key in self.store.gc(keep_latest=keep).removed:
            del self.model[key]
        assert len(self.model) <= keep
        done["gc"] += 1

    @rule()
    def rebuild(self):
        assert self.store.rebuild() == len(self.model)
        done["rebuild"] += 1

    @rule()
    def list(self):
        assert {entry.key: entry.metrics["v"] for entry in self.store.list()} == self.model
        done["list"] += 1

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


FEW = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = FEW


if __name__ == "__main__":
    os.fsync = lambda descriptor: None
    many = settings(FEW, max_examples=int(sys.argv[1]), stateful_step_count=40)
    run_state_machine_as_test(StoreAgainstDict, settings=many)
    sys.stdout.write(f"{sum(done.values())} steps: {dict(done)}\n")
