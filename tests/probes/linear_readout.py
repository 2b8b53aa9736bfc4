"""The linear readout: the one case of an activation attack that is solved exactly.

Position i has logits W_i P with a Gaussian W_i of shape [d_vocab, D], where D counts the controlled
dimensions (a * d_model). The scale of P is free, so forcing t tokens asks for a point inside t
cones. For two tokens each cone is a half-space in general position, and by Wendel's theorem

    p(t, D) = 2^-(t-1) * sum over k < D of C(t-1, k)

which is 1/2 at t = 2 D: so kappa = 2 d_model and chi = bits / 2. No method can do better.

Wendel 1962, "A problem in geometric probability"; card section 6.
"""

from math import comb

import torch
from jaxtyping import Float
from torch import Tensor

from probes.activation_attacks_optimise import LogitsOf


def feasible_share(n_target: int, n_dims: int) -> float:
    """Probability that ``n_target`` random binary tokens can be forced with ``n_dims`` numbers."""
    favourable = sum(comb(n_target - 1, k) for k in range(n_dims))
    return favourable / 2 ** (n_target - 1)


def draw_readouts(
    shape: tuple[int, int, int, int], generator: torch.Generator
) -> Float[Tensor, "problem t d_vocab n_dims"]:
    """Gaussian readouts; the shape is [problem t d_vocab n_dims]."""
    return torch.randn(shape, generator=generator)


def linear_logits(readout: Float[Tensor, "problem t d_vocab n_dims"]) -> LogitsOf:
    """The logits W_i P of each slot's own readout, as ``force_tokens`` asks for them."""

    def logits_of(perturbation: Tensor, problem: Tensor) -> Tensor:
        return torch.einsum("stvd,sd->stv", readout[problem], perturbation.flatten(1))

    return logits_of
