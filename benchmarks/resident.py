"""Memory that a process of its own takes, from the status that Linux keeps of it."""

import ctypes
from collections.abc import Callable
from pathlib import Path


def memory_mb(field: str) -> float:
    """A field of this process's status, in MiB: ``VmRSS`` now, ``VmHWM`` at most.

    ``getrusage`` would not do: what a process inherits as its maximum is that of the one which began it.

    Raises:
        LookupError: No such field.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def forget_peak() -> None:
    """Let the peak resident set begin anew: building a model has peaks of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def extra_mb(work: Callable[[], object]) -> float:
    """The most memory that a piece of work takes beyond what the process has, in MiB.

    What the allocator keeps of earlier work is given back before, or it would be used again and not be counted.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_mb("VmRSS")
    forget_peak()
    kept = work()
    taken = memory_mb("VmHWM") - before
    del kept
    return max(taken, 0.0)
