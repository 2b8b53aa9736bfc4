"""Two ways of doing one piece of work, in turn in one process, and what is reported of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import Row

Work = Callable[[], object]
RATIOS = ("ratio", "ratio_min", "ratio_max", "wall_ratio")
ENDS = (("", ""), ("_least", "_min"), ("_most", "_max"))


def seconds(work: Work) -> tuple[float, float]:
    """Of the process's CPU, which work of others disturbs less, and of the wall."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - start


def race(ours: Work, theirs: Work, rounds: int) -> dict[str, Any]:
    """Both in turn; the order alternates, the first round of each is thrown away."""
    seconds(ours), seconds(theirs)
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for index in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, work in pair if index % 2 else pair[::-1]:
            taken[name].append(seconds(work))
    pairs = list(zip(taken["ours"], taken["theirs"], strict=True))
    cpu, wall = ([b[kind] / a[kind] for a, b in pairs] for kind in (0, 1))
    return {
        "ours_s": statistics.median(cpu for cpu, _ in taken["ours"]),
        "theirs_s": statistics.median(cpu for cpu, _ in taken["theirs"]),
        "ratio": statistics.median(cpu),
        "ratio_min": min(cpu),
        "ratio_max": max(cpu),
        "wall_ratio": statistics.median(wall),
        "seconds": taken,
    }


def same(found: Any, wanted: Any, what: str) -> None:
    """Refuse to compare the speed of two different computations."""
    found, wanted = (torch.as_tensor(numbers).detach() for numbers in (found, wanted))
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise SystemExit(
            f"{what}: not the same computation, {(found - wanted).abs().max():.3g} off"
        )


def per(found: dict[str, Any], ours: int, theirs: int, each: int = 1) -> dict[str, Any]:
    """Turn seconds of so many repetitions into a rate of ``each`` things a repetition."""
    scale = ours / theirs
    rates = {
        "ours_per_s": each * ours / found["ours_s"],
        "theirs_per_s": each * theirs / found["theirs_s"],
    }
    scaled = {name: found[name] * scale for name in RATIOS}
    return found | rates | scaled


def rows_of(name: str, found: dict[str, Any], threads: int) -> list[Row]:
    """Ours and the loop's row of one race."""
    sides = []
    for side, peer in (("ours", "workbench"), ("theirs", "plain loop")):
        rate = found.get(f"{side}_per_s")
        sides.append(
            {
                "name": name,
                "peer": peer,
                "threads": threads,
                "median": found[f"{side}_s"] if rate is None else rate,
                "unit": "s" if rate is None else "/ s",
            }
        )
    ratio = {f"ratio{end}": found[f"ratio{old}"] for end, old in ENDS}
    ours = Row(**sides[0], **ratio, note=f"by wall time {found['wall_ratio']:.1f}")
    return [ours, Row(**sides[1], ratio=1.0)]
