"""What a store costs as it grows: list, get, find, publish and rebuild at many results.

The stores are filled without waiting for the disk (``fill``), since a store's size is what is measured; their
results are small and differ in key, probe, model, time and numbers. Every figure is a median of rounds in a
fresh process's second call, wall and CPU seconds beside each other. The limit of a verb is what its bytes cost
without us: plain files of the same sizes are read, or written, flushed and moved.

    python benchmarks/store.py --sizes 1000 10000 100000

Filling 1e5 takes minutes. ``--folder DIR --fill 200`` only fills, for 200 seconds at most, and goes on from there
when it is called again; stores in a folder that was given are measured as they are, and kept.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import safetensors.numpy
from record import OUT, Row, spread, write_record

from workbench.result import Result
from workbench.store.record import ARRAYS, DOCUMENT, MANIFEST
from workbench.store.results import Store
from workbench.store.strict_json import to_json

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


def fill(store: Store, numbers: range, seconds: float = math.inf) -> bool:
    """Put small results into a store as quickly as a filesystem allows: no fsync, no rename.

    What is there is kept. Returns whether all of them are, or the seconds were over before.
    """
    end = time.monotonic() + seconds
    arrays = safetensors.numpy.save({"score": np.zeros((2, 3, 4), np.float32)})
    listed = {ARRAYS: {"size": len(arrays), "sha256": hashlib.sha256(arrays).hexdigest()}}
    for number in numbers:
        if (store.folder(key_of(number)) / MANIFEST).exists():
            continue
        if time.monotonic() > end:
            return False
        result = small_result(number)
        document = to_json(result.document(), indent=1).encode()
        digest = {"size": len(document), "sha256": hashlib.sha256(document).hexdigest()}
        folder = store.folder(result.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARRAYS).write_bytes(arrays)
        (folder / DOCUMENT).write_bytes(document)
        manifest = {"schema": 1, "files": {**listed, DOCUMENT: digest}}
        (folder / MANIFEST).write_bytes(to_json(manifest, indent=1).encode())
    return True


def timed(name: str, shape: str, work: Callable[[], object], rounds: int) -> list[Row]:
    """Wall and CPU seconds of some rounds, a row each; both are said."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    rows = []
    for unit, values in (("s", walls), ("CPU s", cpus)):
        measured = spread(values) if rounds > 1 else {"median": values[0]}
        row = Row(name=name, peer="workbench", shape=shape, threads=1, unit=unit, **measured)
        rows.append(row)
        print(f"{shape:16s} {name:38s} {row.median:10.4f} {unit}", flush=True)
    return rows


def read_files(store: Store, numbers: Iterable[int], names: Sequence[str]) -> None:
    """Read every byte of some results' files."""
    for number in numbers:
        for name in names:
            (store.folder(key_of(number)) / name).read_bytes()


def write_files(files: dict[str, bytes], place: Path) -> None:
    """Write files into a new folder, flush them to the disk, and move the folder to its name."""
    folder = Path(tempfile.mkdtemp(dir=place))
    for name, content in files.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    moved = folder.rename(folder.with_suffix(".moved"))
    for holder in (moved, place):
        descriptor = os.open(holder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def with_limits(rows: list[Row], least: dict[str, Callable[[], object]], rounds: int) -> list[Row]:
    """Rows of wall time with what their bytes cost by themselves."""
    found = {}
    for name, work in least.items():
        work()
        found[name] = timed(f"{name}: its bytes alone", rows[0].shape or "", work, rounds)[0].median
    return [
        dataclasses.replace(row, limit=found[row.name], distance=row.median / found[row.name])
        if row.unit == "s" and row.name in found
        else row
        for row in rows
    ]


def measure(folder: Path, size: int, rounds: int) -> list[Row]:
    """Every verb on a store of one size, which is filled first."""
    store, shape = Store(folder), f"{size} results"
    fill(store, range(size))
    rows = timed("rebuild", shape, store.rebuild, 1)
    one = [store.folder(key_of(0)), *store.folder(key_of(0)).iterdir()]
    on_disk = {
        "on the disk": sum(path.stat().st_blocks * 512 for path in one),
        "catalogue": store.catalogue.path.stat().st_size / size,
    }
    for name, value in on_disk.items():
        rows.append(
            Row(name=name, peer="workbench", shape=shape, median=value, unit="bytes a result")
        )
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
        rows += timed(name, shape, work, rounds)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        return with_limits(rows, least_work(store, size, Path(place)), rounds)


def least_work(store: Store, size: int, place: Path) -> dict[str, Callable[[], object]]:
    """What the bytes of a verb cost by themselves."""
    some, files = range(0, size, max(1, size // 100)), (MANIFEST, DOCUMENT, ARRAYS)
    written = {name: (store.folder(key_of(0)) / name).read_bytes() for name in files}
    return {
        "rebuild": lambda: read_files(store, range(size), files[:2]),
        "list, all": store.catalogue.path.read_bytes,
        "get, 100 keys": lambda: read_files(store, some, files[:2]),
        "get by a prefix, 100 keys": lambda: read_files(store, some, files[:2]),
        "find (every byte checked), 100 keys": lambda: read_files(store, some, files),
        "publish": lambda: write_files(written, place),
        "publish, then list 20 newest": lambda: write_files(written, place),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are kept")
    parser.add_argument("--fill", type=float, default=None, help="only fill, so many seconds")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "store.json")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as opened:
        made = arguments.folder or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        folders = {size: made / str(size) for size in arguments.sizes}
        if arguments.fill is not None:
            end = time.monotonic() + arguments.fill
            for size, folder in folders.items():
                whole = fill(Store(folder), range(size), end - time.monotonic())
                print(f"{size} results: {'all there' if whole else 'not yet all'}")
            return
        rows: list[Row] = []
        for size, folder in folders.items():
            rows += measure(folder, size, arguments.rounds)
    sizes = " ".join(map(str, arguments.sizes))
    write_record(
        "store",
        rows,
        command=f"python benchmarks/store.py --sizes {sizes} --rounds {arguments.rounds}",
        ratio_means="not compared with anything: no other program reads these stores",
        conditions=f"{arguments.rounds} rounds, rebuild once; filled without waiting for the disk",
        packages=("interpretability-workbench", "numpy", "safetensors"),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
