"""How much memory there is, how many prompts fit into it, and what to do when that was too many.

Nothing here imports torch, apart from asking a GPU that is in use.
"""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BATCH_BYTES = 256 << 20
"""Working memory that an automatic batch size aims at; larger batches are no faster on a CPU."""
SHARE = 0.5
"""Of the memory that is free, what a batch may take."""
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller ("" is version 2): limit, use, and what of the use is cache that can be dropped."""


def free_memory_bytes(device: Any = "cpu") -> int:
    """Memory that can be had on a device.

    A GPU's own; else the least of what the system has without swapping, what a container or a
    batch job may use, and this process's own limit.
    """
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_system_bytes(), *_group_bytes(), *_process_bytes()]))


def _system_bytes() -> int:
    found = _field("/proc/meminfo", "MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found


def _group_bytes(own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What this process's control group, and every one around it, leaves."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        controller = "memory" if "memory" in controllers.split(",") else controllers
        if controller not in _CGROUP_FILES:
            continue
        limit, used, cache = _CGROUP_FILES[controller]
        # Inside a container the path may be that of the host: then the root alone is there.
        root, inside = _CGROUPS / controller, Path(group.lstrip("/"))
        for folder in (root / inside, *(root / parent for parent in inside.parents)):
            try:
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                kept = (folder / "memory.stat").read_text("ascii").splitlines()
            except (OSError, ValueError):  # no such group, or "max"
                continue
            droppable = (int(row.split()[1]) for row in kept if row.split()[:1] == [cache])
            yield most - now + next(droppable, 0)


def _process_bytes() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _field("/proc/self/status", "VmSize:")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield limit - used


def _field(path: str, name: str) -> int | None:
    """A figure in kB of one of Linux's tables, in bytes; None where there is none."""
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except (OSError, ValueError):
        return None
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    return next(found, None)


def automatic_batch_size(spec: Any, n_pos: int, free_bytes: int) -> int:
    """Prompts a forward pass that fit into a share of the free memory, a power of two.

    A power of two, so that a run which is begun again chooses as it did before, although a little
    more or less is free, and finds its finished parts.

    Args:
        spec: Sizes of the model.
        n_pos: Tokens of the longest prompt.
        free_bytes: Memory that can be had.
    """
    activations = 4 * n_pos * (16 * spec.d_model + 4 * spec.d_mlp)
    logits = 4 * n_pos * spec.d_vocab
    fits = min(BATCH_BYTES / activations, SHARE * free_bytes / (activations + logits))
    return 1 << max(0, int(fits).bit_length() - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, the CPU's allocator or Python itself says that memory did not suffice."""
    # torch's own class cannot be named without importing torch.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and _says_so(str(error).lower()))
    )


def _says_so(text: str) -> bool:
    return any(words in text for words in ("out of memory", "not enough memory", "allocate memory"))


def backing_off(
    size: int,
    attempt: Callable[[int], T],
    n_rows: int,
    report: Callable[[str], None] = lambda text: None,
) -> T:
    """Call with a batch size; when memory does not suffice, again with half of it, down to 1.

    Args:
        size: The first batch size.
        attempt: Does the whole work with a batch size.
        n_rows: How many rows there are; a larger batch size was that many at most.
        report: Told in one line about each step back.

    Raises:
        MemoryError: Or what the library raised, when a batch of one does not fit either.
    """
    while True:
        try:
            return attempt(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        # Out of the except block the traceback, and with it the tensors of the attempt, are gone.
        size = max(1, min(size, n_rows) // 2)
        _give_back()
        report(f"memory did not suffice; going on with {size} prompts a forward pass")


def _give_back() -> None:
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
