"""Two ways of doing one piece of work, in turn in one process, and what is reported of them.

Their physical limit: the fewer multiplications and additions of matrix products that either of them makes,
at the rate of one large product, both by CPU time.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peaks import peak_flops
from record import Row
from resident import extra_mb
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]
RATIOS = ("ratio", "ratio_min", "ratio_max", "wall_ratio")
ENDS = (("", ""), ("_least", "_min"), ("_most", "_max"))


def seconds(work: Work) -> tuple[float, float]:
    """Of the process's CPU, which work of others disturbs less, and of the wall."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - start


class _NoModules(contextlib.nullcontext[None]):
    """In the place of torch's tracker of modules: all is of one."""

    parents = frozenset({"Global"})


def products(work: Work) -> int:
    """Floating-point operations of all matrix products of some work, backward passes included."""
    counter = FlopCounterMode(display=False)
    # Which module an operation is of is not asked; to find out, torch hooks gradients, and then
    # refuses a gradient that is taken in between.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        work()
    return int(counter.get_total_flops())


@functools.cache
def peak(threads: int, dtype: torch.dtype) -> float:
    """Operations of one large product a CPU second of so many threads together."""
    assert torch.get_num_threads() == threads
    return peak_flops(dtype=dtype, clock=time.process_time)


def race(
    ours: Work, theirs: Work, rounds: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Both in turn; the order alternates, and of a first round of each only the memory is kept."""
    needed = min(products(ours), products(theirs))
    memory = {"ours_mb": extra_mb(ours), "theirs_mb": extra_mb(theirs)}
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
        "limit_s": needed / peak(torch.get_num_threads(), dtype) or None,
        "seconds": taken,
        **memory,
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
    # The limit is of one run of either: it holds for both where they repeat as often.
    limit = found["limit_s"] if ours == theirs else None
    return found | rates | scaled | {"limit_s": limit, "limit_per_s": limit and each * ours / limit}


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
                "peak_memory": found[f"{side}_mb"],
            }
        )
    ratio = {f"ratio{end}": found[f"ratio{old}"] for end, old in ENDS}
    note = f"by wall time {found['wall_ratio']:.1f}"
    ours = Row(**sides[0], **ratio, **limit_of(found, "ours"), note=note)
    return [ours, Row(**sides[1], ratio=1.0, **limit_of(found, "theirs"))]


def limit_of(found: dict[str, Any], side: str) -> dict[str, float]:
    """Entries of a row: the limit in the row's unit, and how many times worse the side is."""
    if not found["limit_s"]:
        return {}
    limit = found.get("limit_per_s") or found["limit_s"]
    return {"limit": limit, "distance": found[f"{side}_s"] / found["limit_s"]}
