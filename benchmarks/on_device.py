"""Seconds, memory and name of the device that a measurement runs on.

A GPU is asked and not waited for: a clock that is read before the device has done its work measures how fast
Python asks.
"""

import time
from collections.abc import Callable

import torch


def clock_of(device: str) -> float:
    """Seconds of the wall, read when the device has done all that it was asked."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """How long a piece of work takes until the device has done it."""
    start = clock_of(device)
    kept = work()
    taken = clock_of(device) - start
    del kept
    return taken


def extra_mb(work: Callable[[], object], device: str) -> float | None:
    """The most memory that a piece of work takes on a GPU beyond what was taken before it, in MiB.

    None for a CPU: in a process that has done other work before, what its allocator kept is used again.
    """
    if torch.device(device).type != "cuda":
        work()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = work()
    torch.cuda.synchronize(device)
    taken = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    del kept
    return taken


def let_go(device: str) -> None:
    """Give back what torch keeps of a GPU's memory and nothing uses."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def name_of(device: str) -> str:
    """What a GPU calls itself, and its memory; nothing for a CPU, which ``record.machine`` names."""
    if torch.device(device).type != "cuda":
        return ""
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
