"""Steps from products of queries and keys to a pattern: precision, cap, mask, softmax."""

import torch
from jaxtyping import Bool
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What scores and patterns are computed in: float32, or float64 where the model is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """A tensor in the precision that scores and patterns have."""
    return x.to(wide_dtype(x))


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores under a soft cap, where there is one."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis; on a CPU in the memory of the scores."""
    if scores.device.type == "cpu" and not scores.requires_grad:
        # Row by row and in place: a tile is read from memory once.
        return torch.softmax(scores, dim=-1, out=scores)
    return torch.softmax(scores, dim=-1)


def shows(mask: Tensor) -> Bool[Tensor, "..."]:
    """Where a bool or additive mask lets a query see a key."""
    if mask.dtype == torch.bool:
        return mask
    # transformers hides with the dtype's minimum, or with -inf.
    return mask > torch.finfo(mask.dtype).min / 2


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores under a bool or additive mask; hidden entries are -inf."""
    if mask.dtype != torch.bool:
        scores = scores + mask
    return scores.masked_fill_(~shows(mask), -torch.inf)
