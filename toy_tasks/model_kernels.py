"""Attention kernels of the toy models: scores to weights, chosen by name.

Papers: Guo et al. 2024, arXiv:2410.13835 (relu); Gu et al. 2024, arXiv:2410.10781 (the others).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Scores = Float[Tensor, "batch head q_pos k_pos"]
"""Masked entries are -inf."""

Vectors = Float[Tensor, "batch pos head d_head"]

# Kernels: scores to weights


def softmax(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Ordinary attention. A row that sees nothing (padding) is 0, not NaN."""
    return torch.where(scores > -torch.inf, row_sum * scores.softmax(dim=-1), 0.0)


def relu(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Positive scores over the number of visible keys."""
    n_visible = (scores > -torch.inf).sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.relu() / n_visible


def sigmoid(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Every key weighed on its own."""
    return scores.sigmoid()


def elu(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Linear above 0, exponential below."""
    return nn.functional.elu(scores) + 1.0


def linear(scores: Scores, row_sum: float = 1.0) -> Scores:
    """The scores as they are; 0 for keys that cannot be seen."""
    return torch.where(scores > -torch.inf, scores, 0.0)


def normalised(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel whose rows are made to sum to 1."""

    def apply(scores: Scores, row_sum: float = 1.0) -> Scores:
        weights = kernel(scores)
        return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-8)

    return apply


KERNELS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "relu": relu,
    "sigmoid": sigmoid,
    "sigmoid-normalised": normalised(sigmoid),
    "elu": elu,
    "elu-normalised": normalised(elu),
    "elu-kernel": linear,
    "elu-kernel-normalised": normalised(linear),
    "softmax-scale": softmax,
}
NORMALISED = frozenset({"softmax", "sigmoid-normalised", "elu-normalised", "elu-kernel-normalised"})
"""Kernels whose rows sum to 1."""

# Features: what queries and keys become before their product


def as_is(x: Vectors) -> Vectors:
    """The features of kernels that are functions of the ordinary scores."""
    return x


def positive(x: Vectors) -> Vectors:
    """elu(x) + 1, so that every score is positive: linear attention."""
    return nn.functional.elu(x) + 1.0


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(KERNELS, as_is),
    "elu-kernel": positive,
    "elu-kernel-normalised": positive,
}
