"""A store under fire: what each verb may leave behind when it is killed, at every step of it.

Each verb (``verbs.py``) is run in a process of its own, which is killed with SIGKILL

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
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.store.verbs import SCENARIOS

fork = multiprocessing.get_context("fork")
MEMORY = Path("/dev/shm")
"""A file system that need not wait for a disk."""
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime")


def _arm(root, number):
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
        points = _arm(world.root, event)
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
