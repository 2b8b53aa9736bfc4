"""ZeroTuning as its papers' code does it: eager attention whose whole pattern is changed.

Written from the method card (zerotuning sections 1 and 6): after softmax, column 0 is scaled and every
row divided by its sum. A kernel of transformers' own interface, of plain tensors.
"""

from typing import Any

import torch

NAME = "benchmark_eager_zerotuning"


def register(gamma: float) -> str:
    """Register the kernel with transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[-2]]
        pattern = edited(torch.softmax(scores, dim=-1), gamma)
        return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NAME


def edited(pattern: Any, gamma: float) -> Any:
    """Scale the first column, divide every row by its sum."""
    pattern[..., 0] *= gamma
    return pattern / pattern.sum(dim=-1, keepdim=True)
