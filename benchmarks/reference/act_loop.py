"""ACT as a research script applies it: eager maps, a copy of them, one head and row after another.

Written anew, from the paper's description (arXiv:2406.15765), with its rule over all rows of a prompt (mode=full):
a key other than the first is a sink when its mean attention is above alpha / T; its weights are scaled by beta and
what they lose is shared out among the other keys in proportion.
"""

import copy
from typing import Any

import torch

NAME = "benchmark_act_loop"


def edited(pattern, alpha, beta):
    """The changed copy of a pattern ``[batch head pos pos]``."""
    changed = copy.deepcopy(pattern)
    n_pos = pattern.shape[-1]
    n_queries = torch.arange(n_pos, 0, -1)
    for prompt in range(pattern.shape[0]):
        for head in range(pattern.shape[1]):
            rows = pattern[prompt, head]
            received = rows.sum(dim=0) / n_queries
            is_sink = received > alpha / n_pos
            is_sink[0] = False
            mass = rows[:, is_sink].sum(dim=1)
            gain = 1 + (1 - beta) * mass / (1 - mass).clamp(min=1e-12)
            new = torch.where(is_sink, beta * rows, rows * gain[:, None])
            changed[prompt, head] = torch.where((mass < 1 - 1e-6)[:, None], new, rows)
    return changed


def register(alpha, beta):
    """Register the kernel with transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(-1, -2) * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[-2]]
        pattern = edited(torch.softmax(scores, dim=-1), alpha, beta)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NAME
