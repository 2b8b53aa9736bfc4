"""What the theory of scan and snap predicts, in closed form and as a flow.

Distinct tokens of one class (Theorem 3). From Z = 0 with gradient flow and long sequences, z_l of a
distinct token moves at a speed proportional to f_l^2, so that at any time

    (1 - exp(-2 z_l)) / P(l|n)^2 = kappa    for all distinct l of class n
    z_l = -1/2 ln(1 - kappa P(l|n)^2)       and hence (f_l/f_l')^2 - 1 = ((P_l/P_l')^2 - 1) chi_l

One common token, K classes, M tokens (Theorems 1 and 4). With rates eta_Y and eta_Z, the decoder's
part gamma rises, then falls as the decoder has learnt, and z of the common token follows

    gamma(t) = r eta_Y t / K                              until t0 = 2 K ln M / eta_Y
    gamma(t) = r K ln(M eta_Y t / K) / (eta_Y t)          after,    r = ((M - 1) / M)^2
    dz/dt = -eta_Z / C0 gamma(t) exp(4 z)

whatever gamma is, B = -z obeys B(t) = 1/4 ln(1 + 4 eta_Z / C0 int_0^t gamma). The paper prints
C0 in place of the 1, with another constant of integration; B(0) = 0 asks for the 1. Its gamma is
known up to constants and not between the branches: here they meet in a jump at t0. C0 belongs to
the class law and is a parameter.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

Speed = Callable[[float], float]
"""gamma at a time."""


@dataclass(frozen=True)
class FlowSettings:
    """Sizes and rates of the flow; the defaults are those of the paper's Fig. 3."""

    n_classes: int = 10
    n_tokens: int = 1000
    rate_y: float = 1.0
    rate_z: float = 0.5
    c0: float = 1.0

    @property
    def transition(self) -> float:
        """t0, when attention goes from scanning to snapping."""
        return 2 * self.n_classes * math.log(self.n_tokens) / self.rate_y

    @property
    def shrunk(self) -> float:
        """r, next to 1 for a large vocabulary."""
        return ((self.n_tokens - 1) / self.n_tokens) ** 2

    def gamma(self, t: float) -> float:
        """Speed that the decoder lends attention at time ``t``."""
        scaled = self.rate_y * t / self.n_classes
        if t < self.transition:
            return self.shrunk * scaled
        return self.shrunk * math.log(self.n_tokens * scaled) / scaled

    def gamma_integral(self, t: float) -> float:
        """Integral of ``gamma`` from 0 to ``t``, in closed form."""
        early = self.shrunk * self.rate_y * min(t, self.transition) ** 2 / (2 * self.n_classes)
        if t <= self.transition:
            return early
        logs = [
            math.log(self.n_tokens * self.rate_y * end / self.n_classes) ** 2
            for end in (self.transition, t)
        ]
        late = self.shrunk * self.n_classes * (logs[1] - logs[0]) / (2 * self.rate_y)
        return early + late

    def suppression(self, t: float) -> float:
        """B at time ``t``: how far the common token's logit has fallen, in nats."""
        return 0.25 * math.log1p(4 * self.rate_z / self.c0 * self.gamma_integral(t))


def integrate_common_logit(
    gamma: Speed, times: Float[Tensor, " time"], rate_z: float, c0: float
) -> Float[Tensor, " time"]:
    """Integrate dz/dt = -rate_z/c0 gamma exp(4z) from z = 0 at the first time (Runge-Kutta 4).

    Args:
        gamma: Speed at a time; a jump in it should fall on one of ``times``.
        times: Increasing; one step is made from each to the next.
        rate_z: eta_Z.
        c0: C0.
    """

    def slope(t: float, z: float) -> float:
        return -rate_z / c0 * gamma(t) * math.exp(4 * z)

    z, values, ends = 0.0, [0.0], times.tolist()
    for start, end in pairwise(ends):
        step = end - start
        first = slope(start, z)
        second = slope(start + step / 2, z + step / 2 * first)
        third = slope(start + step / 2, z + step / 2 * second)
        # The left limit, where gamma jumps at the end of the step.
        fourth = slope(math.nextafter(end, start), z + step * third)
        z += step / 6 * (first + 2 * second + 2 * third + fourth)
        values.append(z)
    return torch.tensor(values, dtype=torch.float64)


def distinct_invariant(
    z: Float[Tensor, "... token"], prob: Float[Tensor, "... token"]
) -> Float[Tensor, "... token"]:
    """(1 - exp(-2 z)) / P^2, which the theory holds equal for the distinct tokens of a class."""
    return -torch.expm1(-2 * z) / prob.square()


def distinct_logits(kappa: float, prob: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Logits of a class's distinct tokens once their invariant is ``kappa``, under 1 / P^2."""
    return -0.5 * torch.log1p(-kappa * prob.square())


def dominant_invariant(z: Float[Tensor, " token"], prob: Float[Tensor, " token"]) -> float:
    """The kappa of a class, from its most frequent distinct token."""
    # One fitted to all of them could ask for an infinite z of that token.
    return float(distinct_invariant(z, prob)[prob.argmax()])
