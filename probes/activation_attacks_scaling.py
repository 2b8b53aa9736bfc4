"""From success curves to numbers: t_max, kappa, the exponent and chi, with bootstrap intervals."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HALF = 0.5
N_RESAMPLES = 1000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Fit:
    """The scaling law of one set of success curves."""

    kappa: float
    """sum(a t_max) / sum(a^2): target tokens per attacked position."""
    exponent: float
    """Slope of log t_max on log a; NaN with fewer than two usable a."""


def reached_half(
    curve_t: Int[Tensor, " t"], share: Float[Tensor, "a t"]
) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
    """Where each curve falls below one half, and whether it was never seen to fall.

    Between the last measured t with at least one half and the next one, the curve is taken as a
    straight line. 0 where not even the smallest t was reached in half of the cases.

    Args:
        curve_t: Ascending.
        share: Mean success; NaN where not measured.
    """
    t_max, censored = torch.zeros(len(share)), torch.zeros(len(share), dtype=torch.bool)
    for row, values in enumerate(share):
        measured = ~values.isnan()
        t, p = curve_t[measured].float(), values[measured]
        passed = (p >= HALF).nonzero()[:, 0]
        if not len(passed):
            continue
        last = int(passed[-1])
        t_max[row] = t[last]
        if last + 1 == len(t):
            censored[row] = True
        else:
            part = (p[last] - HALF) / (p[last] - p[last + 1])
            t_max[row] += part * (t[last + 1] - t[last])
    return t_max, censored


def fit(n_attacked: Int[Tensor, " a"], t_max: Float[Tensor, " a"]) -> Fit:
    """Kappa through the origin and the log-log slope (over the a with t_max above 0)."""
    a, t = n_attacked.double(), t_max.double()
    kappa = float((a * t).sum() / (a * a).sum())
    usable = t > 0
    x, y = a[usable].log(), t[usable].log()
    spread = x - x.mean()
    if len(x) < 2 or not bool((spread**2).sum() > 0):
        return Fit(kappa, math.nan)
    return Fit(kappa, float((spread * y).sum() / (spread**2).sum()))


def bootstrap(
    n_attacked: Int[Tensor, " a"], curve_t: Int[Tensor, " t"], success: Float[Tensor, "a t seed"]
) -> list[Fit]:
    """Fits of resampled seeds; a seed keeps its context and target over all a and t."""
    generator = torch.Generator().manual_seed(0)
    n_seeds = success.shape[-1]
    fits = []
    for _ in range(N_RESAMPLES):
        drawn = torch.randint(n_seeds, (n_seeds,), generator=generator)
        t_max, _ = reached_half(curve_t, success[..., drawn].mean(dim=-1))
        fits.append(fit(n_attacked, t_max))
    return fits


def interval(values: list[float]) -> tuple[float, float]:
    """The middle 95 percent of the values that are numbers; NaN without any."""
    found = torch.tensor(values, dtype=torch.float64)
    low, high = found.nanquantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high


def resistance(kappa: float, d_model: int, d_vocab: int, bits: int) -> float:
    """Chi: bits put in per bit got out, d_model bits / (kappa log2 d_vocab)."""
    return d_model * bits / (kappa * math.log2(d_vocab))
