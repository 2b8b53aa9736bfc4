"""How long what heads write into the residual stream is: |v W_O| of every query head.

|v W_O|^2 = v (W_O W_O^T) v^T, so the norm comes from the Gram matrices, ``d_head x d_head`` a head;
what is written, ``batch x pos x head x d_model``, is never made.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.base import ModelAdapter


def output_grams(model: ModelAdapter) -> list[Float[Tensor, "head d_head d_head"]]:
    """W_O W_O^T of every layer."""
    weights = (model.weight("W_O", layer) for layer in range(model.spec.n_layers))
    return [w_o @ w_o.transpose(-1, -2) for w_o in weights]


def written_norm(
    value: Float[Tensor, "batch pos kv_head d_head"], gram: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "batch head pos"]:
    """|v W_O| per query head, from one layer's values and Gram matrices."""
    value = value.float().repeat_interleave(gram.shape[0] // value.shape[2], dim=2)
    squared = torch.einsum("bphd,hde,bphe->bhp", value, gram, value)
    return squared.clamp(min=0).sqrt()
