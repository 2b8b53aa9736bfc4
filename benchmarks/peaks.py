"""What the machine could do at best, measured: the two physical limits of a forward pass.

The arithmetic peak is the rate of a large float32 matrix product; the bandwidth is that of adding one array
too large for any cache to another (two read, one written). Both are the best of several rounds: a limit is what
was reached once. Beside them, what a GPT-2 must do: multiplications, and bytes that must come from memory.
"""

import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 5
WORD = 4
"""Bytes of a float32."""


def best_seconds(
    work: Callable[[], object],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The shortest of some runs, after one that is not counted."""
    work()
    taken = []
    for _ in range(rounds):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)


def peak_flops(
    size: int = 1536,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Floating-point operations a second of a square product (a multiplication and an addition are two)."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), clock=clock)


def peak_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second between memory and processor."""
    n = megabytes * 2**20 // WORD
    a, b, out = torch.ones(n), torch.ones(n), torch.empty(n)
    return 3 * WORD * n / best_seconds(lambda: torch.add(a, b, out=out))


def gpt2_flops(
    shape: Mapping[str, int], n_pos: int, *, unembed: bool, cached: int = 0, batch: int = 1
) -> float:
    """Floating-point operations that a forward pass of a GPT-2 cannot do without.

    Twelve d_model^2 of weights a block and position (queries, keys, values, output, the MLP's two), scores and
    their products with values over the visible half of the pattern, and the unembedding.

    Args:
        shape: ``n_layer``, ``n_embd``, ``vocab_size`` of a GPT2Config.
        n_pos: Length of the prompts.
        unembed: Whether logits are made at every position.
        cached: Positions before them whose keys and values are kept.
        batch: Prompts.
    """
    width = shape["n_embd"]
    weights = shape["n_layer"] * 12 * width * width
    attention = shape["n_layer"] * (2 * cached + n_pos + 1) * width
    logits = width * shape["vocab_size"] if unembed else 0
    return 2.0 * batch * n_pos * (weights + attention + logits)


def gpt2_bytes(
    shape: Mapping[str, int], *, unembed: bool, cached: int = 0, batch: int = 1
) -> float:
    """Bytes that a pass must read: every weight once, and the keys and values of cached positions.

    Activations are left out: they may stay in caches, so this is a lower bound.
    """
    width = shape["n_embd"]
    weights = shape["n_layer"] * 12 * width * width
    logits = width * shape["vocab_size"] if unembed else 0
    return float(WORD * (weights + logits + batch * cached * shape["n_layer"] * 2 * width))


def limits(flops: float, n_bytes: float) -> dict[str, tuple[float, str]]:
    """Seconds that a pass takes at least on this machine, and how they come about, by what bounds it.

    Args:
        flops: Of the pass.
        n_bytes: That it must read.
    """
    peak = peak_flops(), peak_bandwidth()
    least = least_seconds(flops, n_bytes, peak)
    products = f"{flops / 1e9:,.3g} GFLOP at {peak[0] / 1e9:,.0f} GFLOP/s, a matrix product's rate"
    reading = f"{n_bytes / 1e6:,.0f} MB at {peak[1] / 1e9:.1f} GB/s, adding two arrays"
    return {
        "arithmetic": (least["arithmetic"], products),
        "bandwidth": (least["bandwidth"], reading),
    }


def least_seconds(flops: float, n_bytes: float, peak: tuple[float, float]) -> dict[str, float]:
    """What a pass takes at least: by arithmetic, by bandwidth, and the larger of the two.

    Args:
        flops: Of the pass.
        n_bytes: That it must read.
        peak: Operations a second and bytes a second.
    """
    found = {"arithmetic": flops / peak[0], "bandwidth": n_bytes / peak[1]}
    return found | {"limit": max(found.values())}
