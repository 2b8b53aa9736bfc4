"""Sink scores of patterns that are known exactly, drawn beside the measured ones.

T is a prompt's length, k a key's position counted from 0, and H_n = 1 + 1/2 + ... + 1/n.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int


def uniform_score(lengths: Int[np.ndarray, " prompt"]) -> Float[np.ndarray, " pos"]:
    """The mean score of each key if every query attended evenly: (H_T - H_k) / (T - k)."""
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, lengths.max() + 1))])
    return _mean_over_prompts(
        lengths, lambda n_pos, pos: (harmonic[n_pos] - harmonic[pos]) / (n_pos - pos)
    )


def own_query_score(lengths: Int[np.ndarray, " prompt"]) -> Float[np.ndarray, " pos"]:
    """The mean score of each key if every query attended to itself alone: 1 / (T - k)."""
    return _mean_over_prompts(lengths, lambda n_pos, pos: 1.0 / (n_pos - pos))


def _mean_over_prompts(
    lengths: Int[np.ndarray, " prompt"], score: Callable[[int, np.ndarray], np.ndarray]
) -> Float[np.ndarray, " pos"]:
    """Mean over the prompts that reach each position, as in the measured means."""
    pos = np.arange(lengths.max())
    total, reaching = np.zeros(len(pos)), np.zeros(len(pos))
    for n_pos in lengths:
        total[:n_pos] += score(n_pos, pos[:n_pos])
        reaching[:n_pos] += 1
    return np.asarray(total / reaching)
