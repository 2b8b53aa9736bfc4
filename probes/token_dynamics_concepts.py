"""Concept vectors and parameterless attention: the walk's two parameter-free baselines.

Paper: Singh 2023, arXiv:2308.10874. Card: embedding_walk section 6, after the author's experiments.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import ConfigError

AGGREGATIONS = ("mean", "last", "w1mean")
_ROWS = 256
"""Queries at a time: no pos x pos matrix of a long prompt."""


def concept_vector(
    hidden: Float[Tensor, "batch pos d_model"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    how: str = "w1mean",
) -> Float[Tensor, "batch d_model"]:
    """One vector for a text, from its hidden states.

    Args:
        hidden: Hidden states of one layer.
        attention_mask: 1 where a token is; None: everywhere.
        how: ``mean``; ``last`` token; ``w1mean``: sum of t h_t over sum of t, t from 1.

    Raises:
        ConfigError: Another way.
    """
    if how not in AGGREGATIONS:
        raise ConfigError(f"how must be one of {', '.join(AGGREGATIONS)}; got {how}")
    real = hidden.new_ones(hidden.shape[:2])
    if attention_mask is not None:
        real = attention_mask.to(hidden)
    place = real.cumsum(dim=1) * real
    if how == "last":
        weight = (place == place.max(dim=1, keepdim=True).values).to(hidden)
    else:
        weight = place if how == "w1mean" else real
    share = weight / weight.sum(dim=1, keepdim=True)
    return torch.einsum("bpd,bp->bd", hidden, share)


def parameterless_attention(
    embed: Float[Tensor, "batch pos d_model"], n_layers: int = 1
) -> Float[Tensor, "batch pos d_model"]:
    """softmax(causal(Q Q^T)) Q, n_layers times; no weights, no scaling, no MLP."""
    for _ in range(n_layers):
        embed = torch.cat([_attend(embed, row) for row in range(0, embed.shape[1], _ROWS)], dim=1)
    return embed


def _attend(x: Float[Tensor, "batch pos d_model"], start: int) -> Float[Tensor, "batch rows d"]:
    rows = torch.arange(start, min(start + _ROWS, x.shape[1]), device=x.device)
    hidden = torch.arange(x.shape[1], device=x.device) > rows[:, None]
    scores = (x[:, rows] @ x.transpose(1, 2)).masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1) @ x
