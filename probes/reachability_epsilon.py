"""k-epsilon curves: which share of the targets no control of at most k tokens reaches.

    epsilon(k) = share of pairs whose target is not in R^k(x_0),    |u| <= k

A search only finds controls, so what it gives is an upper bound on epsilon. Pairs that share a state
are not independent, so intervals resample states, not pairs.

Paper: Bhargava et al. 2023, arXiv:2310.04444, section 4.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_RESAMPLES = 2000
COVERAGE = 0.95


def epsilon_curve(k: Int[Tensor, " pair"], k_max: int) -> Float[Tensor, " length"]:
    """epsilon(0), ..., epsilon(k_max), each in [0, 1].

    Args:
        k: Length of the shortest control that was found; -1: none was.
        k_max: Longest control that was looked for.
    """
    return _missed(k, k_max).mean(dim=0)


def epsilon_interval(
    k: Int[Tensor, " pair"], k_max: int, state: Int[Tensor, " pair"], generator: torch.Generator
) -> tuple[Float[Tensor, " length"], Float[Tensor, " length"]]:
    """The 95 % percentile interval of ``epsilon_curve`` when states are drawn anew.

    Args:
        k: Length of the shortest control that was found; -1: none was.
        k_max: Longest control that was looked for.
        state: Index of each pair's state.
        generator: Draws the states.
    """
    missed = _missed(k, k_max)
    _, state = state.unique(return_inverse=True)
    n_states = int(state.max()) + 1
    by_state = torch.zeros(n_states, k_max + 1).index_add_(0, state, missed)
    n_pairs = torch.bincount(state, minlength=n_states).float()
    drawn = torch.randint(n_states, (N_RESAMPLES, n_states), generator=generator)
    curves = by_state[drawn].sum(dim=1) / n_pairs[drawn].sum(dim=1, keepdim=True)
    outside = (1.0 - COVERAGE) / 2
    low, high = curves.quantile(torch.tensor([outside, 1.0 - outside]), dim=0)
    return low, high


def _missed(k: Int[Tensor, " pair"], k_max: int) -> Float[Tensor, "pair length"]:
    lengths = torch.arange(k_max + 1)
    return ((k[:, None] < 0) | (k[:, None] > lengths)).float()
