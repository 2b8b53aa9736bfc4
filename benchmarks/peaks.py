"""What the machine could do at best, measured: the two physical limits of a forward pass.

The arithmetic peak is the rate of a large matrix product in the model's precision; the bandwidth is that of
adding one array too large for any cache to another (two read, one written). Both are the best of several rounds:
a limit is what was reached once. Beside them, what a decoder must do: multiplications, and bytes that must come
from memory.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from on_device import clock_of

ROUNDS = 5
WORD = 4
"""Bytes of a float32."""
PRODUCT = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the product that shows a device's rate: smaller ones leave a GPU partly idle."""
ARRAY_MB = {"cpu": 256, "cuda": 2048}
"""Of each array that is added: far more than the device's caches hold."""


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
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] | None = None,
    device: str = "cpu",
) -> float:
    """Floating-point operations a second of a square product (a multiplication and an addition are two).

    Args:
        size: Rows and columns; None: what suits the device.
        dtype: Of the numbers.
        clock: Seconds; None: of the wall, when the device has done what it was asked.
        device: Where it runs.
    """
    size = size or PRODUCT[torch.device(device).type]
    make = {"dtype": dtype, "device": device}
    a, b = (torch.randn(size, size, **make) for _ in range(2))
    out = torch.empty(size, size, **make)
    product = partial(torch.mm, a, b, out=out)
    return 2 * size**3 / best_seconds(product, clock=clock or partial(clock_of, device))


def peak_bandwidth(megabytes: int | None = None, device: str = "cpu") -> float:
    """Bytes a second between memory and processor; the size is that of each array."""
    megabytes = megabytes or ARRAY_MB[torch.device(device).type]
    n = megabytes * 2**20 // WORD
    a, b, out = (torch.ones(n, device=device) for _ in range(3))
    adding = partial(torch.add, a, b, out=out)
    return 3 * WORD * n / best_seconds(adding, clock=partial(clock_of, device))


@dataclass(frozen=True)
class Decoder:
    """What the products of a decoder's forward pass go through."""

    n_layers: int
    d_model: int
    """Width of the residual stream, and of the queries of all heads together."""
    n_weights: int
    """Of the matrices of one block."""
    d_vocab: int

    @staticmethod
    def gpt2(shape: Mapping[str, int]) -> "Decoder":
        """From ``n_layer``, ``n_embd``, ``vocab_size`` of a GPT2Config.

        Twelve d_model^2 a block: queries, keys, values, output and the MLP's two, four times as wide.
        """
        width = shape["n_embd"]
        return Decoder(shape["n_layer"], width, 12 * width * width, shape["vocab_size"])

    @staticmethod
    def llama(shape: Mapping[str, float]) -> "Decoder":
        """From ``hidden_size`` etc. of a LlamaConfig in which every query head has keys of its own.

        Four d_model^2 a block for attention, and three matrices d_model x d_mlp of a gated MLP.
        """
        width, d_mlp = int(shape["hidden_size"]), int(shape["intermediate_size"])
        n_weights = 4 * width * width + 3 * width * d_mlp
        n_layers, d_vocab = int(shape["num_hidden_layers"]), int(shape["vocab_size"])
        return Decoder(n_layers, width, n_weights, d_vocab)

    def flops(self, n_pos: int, *, unembed: bool, cached: int = 0, batch: int = 1) -> float:
        """Floating-point operations that a forward pass cannot do without.

        The blocks' weights at every position, scores and their products with values over the visible half
        of the pattern, and the unembedding.

        Args:
            n_pos: Length of the prompts.
            unembed: Whether logits are made at every position.
            cached: Positions before them whose keys and values are kept.
            batch: Prompts.
        """
        weights = self.n_layers * self.n_weights
        attention = self.n_layers * (2 * cached + n_pos + 1) * self.d_model
        return 2.0 * batch * n_pos * (weights + attention + self._logits(unembed))

    def n_bytes(self, *, unembed: bool, cached: int = 0, batch: int = 1, word: int = WORD) -> float:
        """Bytes that a pass must read: every weight once, and the keys and values of cached positions.

        Activations are left out: they may stay in caches, so this is a lower bound.

        Args:
            unembed: Whether logits are made.
            cached: Positions whose keys and values are kept.
            batch: Prompts.
            word: Bytes of a number.
        """
        kept = batch * cached * self.n_layers * 2 * self.d_model
        weights = self.n_layers * self.n_weights
        return float(word * (weights + self._logits(unembed) + kept))

    def _logits(self, unembed: bool) -> int:
        return self.d_model * self.d_vocab if unembed else 0


def limits(
    flops: float, n_bytes: float, peak: tuple[float, float] | None = None
) -> dict[str, tuple[float, str]]:
    """Seconds that a pass takes at least on this machine, and how they come about, by what bounds it.

    Args:
        flops: Of the pass.
        n_bytes: That it must read.
        peak: Operations and bytes a second; None: measured now, on the CPU in float32.
    """
    peak = peak or (peak_flops(), peak_bandwidth())
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
