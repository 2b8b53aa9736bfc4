"""Edited attention in plain tensors and double precision, as a kernel of transformers' own.

Written from the method cards; it shares no line with the engine. Registered under a name of its own, it
stands in for the stock kernel of a whole model, so that logits and generated tokens can be compared.
A rule takes a pattern [batch head q k], learned sinks as its last column, and the first real key, and
gives the edited pattern.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def zerotuning(gammas):
    """a'_0 = gamma a_0 / D, a'_i = a_i / D, one gamma a head. Card zerotuning section 1."""

    def rule(pattern, first):
        edited = pattern.clone()
        for prompt, head, row in rows(pattern):
            weights = pattern[prompt, head, row]
            scale = 1 + (gammas[head] - 1) * weights[first]
            edited[prompt, head, row] = weights / scale
            edited[prompt, head, row, first] = gammas[head] * weights[first] / scale
        return edited

    return rule


def act(alpha, beta, mode):
    """Columns above alpha / n lose, the others grow in proportion. Card act section 2."""

    def rule(pattern, first):
        edited, n_pos = pattern.clone(), pattern.shape[2]
        for prompt, head, row in rows(pattern):
            if row < first:
                continue
            weights, last = pattern[prompt, head], n_pos if mode == "full" else row + 1
            sinks = []
            for key in range(first + 1, row + 1):
                received = weights[key:last, key].sum() / (last - key)
                if received > alpha / (last - first):
                    sinks.append(key)
            mass = weights[row, sinks].sum()
            others = weights[row].clone()
            others[sinks] = 0.0
            if others.sum() > 0:
                edited[prompt, head, row] *= 1 + (1 - beta) * mass / others.sum()
                edited[prompt, head, row, sinks] = beta * weights[row, sinks]
        return edited

    return rule


def rows(pattern):
    batch, n_heads, n_rows = pattern.shape[:3]
    return ((b, h, r) for b in range(batch) for h in range(n_heads) for r in range(n_rows))


def softmaxed(scores, sinks):
    """Softmax over the keys and a learned sink, which becomes the last column."""
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(dim=-1).nan_to_num(0.0)


@contextmanager
def edited_by(model, rule=None, *, first=0, key_factor=1.0) -> Iterator[None]:
    """Run a transformers model without a cache, its pattern changed by a rule; restored afterwards.

    ``first`` is the first real key of all prompts; ``key_factor`` multiplies that key, before the cap.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
        key = key.clone()
        key[:, :, first] *= key_factor
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query.double() @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = mask[..., : scores.shape[-1]] < -1e30
        scores = scores.masked_fill(hidden, -torch.inf)
        pattern = softmaxed(scores, s_aux)
        if rule is not None:
            pattern = rule(pattern, first)
        mixed = pattern[..., : value.shape[2]] @ value
        return mixed.transpose(1, 2).to(query.dtype).contiguous(), None

    AttentionInterface.register("plain_reference", attention)
    AttentionMaskInterface.register("plain_reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    stock = model.config._attn_implementation
    model.set_attn_implementation("plain_reference")
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
