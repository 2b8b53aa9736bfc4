"""Scores of every query on a few keys, without a pass over the others."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.attention.scores import capped, shows, wide

Factor = float | int | Float[Tensor, " head"]
"""What multiplies the scores on some keys: one number, or one for each head."""


def key_scores(
    inputs: AttentionInputs, columns: Int[Tensor, "batch n"], factor: Factor = 1
) -> Float[Tensor, "batch head q_pos n"]:
    """Scores on some keys, their raw scores times ``factor`` (as if the keys were), before softmax.

    Scaled and capped; -inf where a query must not see the key and where there is no such key.

    Args:
        inputs: Of the layer.
        columns: The keys of every prompt.
        factor: One number, or one for each head.
    """
    return capped_and_masked(inputs, _products(inputs, columns), factor, columns)


def first_key_gain(
    inputs: AttentionInputs,
    first_key: Int[Tensor, " batch"] | None,
    factor: Float[Tensor, " head"],
) -> Float[Tensor, "batch head q_pos"]:
    """What the scores on the first key gain when its products are multiplied; masks left aside."""
    score = first_key_products(inputs, first_key) * inputs.scaling
    factor = factor.to(score)[:, None]
    if inputs.softcap is None:
        return score * (factor - 1.0)
    return capped(score * factor, inputs.softcap) - capped(score, inputs.softcap)


def first_key_products(
    inputs: AttentionInputs, first_key: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch head q_pos"]:
    """Products of every query with the first key of its prompt, before any scale."""
    if first_key is None:
        return _first_products(inputs)
    return _products(inputs, first_key[:, None])[..., 0]


def _products(
    inputs: AttentionInputs, columns: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch head q_pos n"]:
    key = picked_keys(inputs.key, columns, inputs.n_groups)
    return torch.einsum("bhqd,bhnd->bhqn", wide(inputs.query), key)


def _first_products(inputs: AttentionInputs) -> Float[Tensor, "batch head q_pos"]:
    """Products of every query with column 0: query heads of one group are rows of one product."""
    batch, n_heads, n_q, d_head = inputs.query.shape
    query = wide(inputs.query).reshape(batch, inputs.key.shape[1], -1, d_head)
    key = wide(inputs.key[:, :, :1]).transpose(-1, -2)
    return torch.matmul(query, key).view(batch, n_heads, n_q)


def capped_and_masked(
    inputs: AttentionInputs,
    products: Float[Tensor, "batch head q_pos n"],
    factor: Factor,
    columns: Int[Tensor, "batch n"] | None = None,
) -> Float[Tensor, "batch head q_pos n"]:
    """Scores from products with some keys; ``columns`` None: column 0 of all prompts."""
    if isinstance(factor, Tensor):
        factor = factor.to(products)[:, None, None]
    score = products * (inputs.scaling * factor)
    score = capped(score, inputs.softcap)
    if columns is None:
        if inputs.mask is None:
            return score  # the first key comes before every query
        picked, there = inputs.mask[..., :1], None
    else:
        n_q, n_k = inputs.query.shape[2], inputs.key.shape[2]
        there = ((columns >= 0) & (columns < n_k))[:, None, None]
        if inputs.mask is None:
            row = torch.arange(n_q, device=columns.device)[:, None] + inputs.offset
            seen = columns[:, None, None] <= row if inputs.causal else there
            return score.masked_fill(~(seen & there), -torch.inf)
        mask = inputs.mask.expand(columns.shape[0], -1, -1, -1)
        index = columns.clamp(0, n_k - 1)[:, None, None].expand(*mask.shape[:3], -1)
        picked = mask.gather(-1, index)
    if picked.dtype != torch.bool:
        score = score + picked
    seen = shows(picked) if there is None else shows(picked) & there
    # Hidden keys are dropped by where, not by a product: their score may overflow exp.
    return score.masked_fill(~seen, -torch.inf)


def picked_keys(x: Tensor, columns: Tensor, n_groups: int) -> Float[Tensor, "batch head n d"]:
    """Keys or values at some columns, ``wide``, one for each query head."""
    rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
    picked = x.transpose(1, 2)[rows, columns.clamp(0, x.shape[2] - 1)]
    return wide(picked.transpose(1, 2)).repeat_interleave(n_groups, dim=1)
