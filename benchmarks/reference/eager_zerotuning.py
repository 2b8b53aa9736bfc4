"""ZeroTuning as its papers' code does it: eager attention whose whole pattern, or first key, is changed.

Written from the method card (zerotuning sections 1, 2 and 6): after softmax, column 0 is scaled and every
row divided by its sum; ``mode=key`` multiplies the first key itself. A kernel of transformers' own
interface, of plain tensors; softmax in float32, as transformers' own.
"""

from typing import Any

import torch

NAME = "benchmark_eager_zerotuning"


def register(gamma: float, mode: str = "score") -> str:
    """Register the kernel with transformers; returns its name, one for each gamma and mode."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if mode == "key":
            key = torch.cat([key[:, :, :1] * gamma, key[:, :, 1:]], dim=2)
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[-2]]
        pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if mode == "score":
            pattern = edited(pattern, gamma)
        pattern = pattern.to(query.dtype)
        return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern

    name = f"{NAME}_{mode}_{gamma:g}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return name


def edited(pattern: Any, gamma: float) -> Any:
    """Scale the first column, divide every row by its sum."""
    pattern[..., 0] *= gamma
    return pattern / pattern.sum(dim=-1, keepdim=True)
