"""What a store costs as it grows: list, get, find, publish and rebuild at many results.

The stores are filled without waiting for the disk (``fill``), since a store's size is what is measured; their
results are small and differ in key, probe, model, time and numbers. Every figure is a median of rounds in a
fresh process's second call, wall and CPU seconds beside each other.

    python benchmarks/store.py --sizes 1000 10000 100000
"""

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import safetensors.numpy

from workbench.result import Result
from workbench.store.record import ARRAYS, DOCUMENT, MANIFEST
from workbench.store.results import Store
from workbench.store.strict_json import to_json

OUT = Path(__file__).parent / "out" / "store.json"
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
PROBES = ("attention-sinks", "active-dormant", "token-dynamics", "reachability")


def key_of(number: int) -> str:
    """The key of the result with a number."""
    return hashlib.sha256(f"result {number}".encode()).hexdigest()


def small_result(number: int) -> Result:
    """A small result; its number is one of its metrics."""
    return Result(
        key=key_of(number),
        probe=PROBES[number % len(PROBES)],
        version=1,
        config={"threshold": 0.3, "position": 0, "inputs": "natural"},
        arrays={"score": np.zeros((2, 3, 4), np.float32)},
        metrics={"number": number, "mean_score": number / 7, "n_prompts": 28, "n_pos": 64},
        provenance={
            "model": f"model-{number % 10}",
            "revision": key_of(-1),
            "created": (FIRST + timedelta(seconds=number)).isoformat(),
            "environment": {"torch": "2.13.0", "python": "3.11", "platform": "Linux-x86_64"},
        },
    )


def fill(store: Store, numbers: range) -> None:
    """Put small results into a store as quickly as a filesystem allows: no fsync, no rename."""
    arrays = safetensors.numpy.save({"score": np.zeros((2, 3, 4), np.float32)})
    listed = {ARRAYS: {"size": len(arrays), "sha256": hashlib.sha256(arrays).hexdigest()}}
    for number in numbers:
        result = small_result(number)
        document = to_json(result.document(), indent=1).encode()
        digest = {"size": len(document), "sha256": hashlib.sha256(document).hexdigest()}
        folder = store.folder(result.key)
        folder.mkdir(parents=True)
        (folder / ARRAYS).write_bytes(arrays)
        (folder / DOCUMENT).write_bytes(document)
        manifest = {"schema": 1, "files": {**listed, DOCUMENT: digest}}
        (folder / MANIFEST).write_bytes(to_json(manifest, indent=1).encode())


def timed(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median wall and CPU seconds of some rounds, and the wall's spread."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "seconds": statistics.median(walls),
        "least": min(walls),
        "most": max(walls),
        "cpu_seconds": statistics.median(cpus),
    }


def measure(folder: Path, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Every verb on a store of one size, which is filled first."""
    store = Store(folder)
    fill(store, range(size))
    found = {"rebuild": timed(store.rebuild, 1)}
    keys = [key_of(number) for number in range(0, size, max(1, size // 100))]
    fresh = iter(range(size, 2 * size))

    def publish_and_list() -> None:
        store.publish(small_result(next(fresh)))
        store.list(limit=20)

    verbs: dict[str, Callable[[], object]] = {
        "list, all": store.list,
        "list, 20 newest": lambda: store.list(limit=20),
        "list, one probe on one model": lambda: store.list(PROBES[0], "model-0"),
        "get, 100 keys": lambda: [store.get(key) for key in keys],
        "get by a prefix, 100 keys": lambda: [store.get(key[:12]) for key in keys],
        "find (every byte checked), 100 keys": lambda: [store.find(key) for key in keys],
        "publish": lambda: store.publish(small_result(next(fresh))),
        "publish, then list 20 newest": publish_and_list,
    }
    for name, work in verbs.items():
        work()
        found[name] = timed(work, rounds)
        print(f"{size:7d}  {name:38s} {found[name]['seconds'] * 1e3:10.1f} ms", flush=True)
    return found


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are made")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = {}
    for size in arguments.sizes:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            start = time.perf_counter()
            found[str(size)] = measure(folder, size, arguments.rounds)
            print(f"{size:7d}  all of it: {time.perf_counter() - start:.0f} s", flush=True)
        finally:
            shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"python": sys.version.split()[0], "platform": platform.platform()}
    arguments.output.write_text(
        json.dumps({**about, "rounds": arguments.rounds, "sizes": found}, indent=1)
    )


if __name__ == "__main__":
    main()
