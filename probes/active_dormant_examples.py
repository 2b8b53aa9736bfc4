"""Patterns of a few heads on one prompt of each domain, small enough to keep for the figures."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.active_dormant_statistics import Domains
from workbench.context import Context
from workbench.encoding import token_texts
from workbench.models.base import ModelAdapter, Site

EXAMPLE_POS = 48
"""Tokens of an example; attention looks back only, so a cut prompt has the pattern's corner."""


class Examples(NamedTuple):
    """What is kept to be looked at."""

    tokens: Int[Tensor, "domain example_pos"]
    pattern: Float[Tensor, "example domain example_pos example_pos"]
    texts: tuple[str, ...]


def choose_heads(
    sink: Float[Tensor, "domain layer head"],
    loss: Float[Tensor, "domain layer head"],
    dormant: Bool[Tensor, "domain layer head"],
    n: int,
) -> Int[Tensor, "example 2"]:
    """The heads to show, the clearest first.

    Active-dormant ones by how much the loss they prevent differs between domains; then the others
    by how much their sink attention does.
    """
    switches = dormant.any(dim=0) & ~dormant.all(dim=0)
    spread = sink.amax(dim=0) - sink.amin(dim=0)
    missed = loss.amax(dim=0) - loss.amin(dim=0)
    # Sink attention spreads over at most 1, so a head that switches comes before all others.
    interest = torch.where(switches, 2.0 + missed.clamp(min=0.0), spread)
    order = interest.flatten().argsort(descending=True, stable=True)[:n]
    return torch.stack([order // sink.shape[2], order % sink.shape[2]], dim=1)


def read_examples(
    model: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    domains: Domains,
    heads: Int[Tensor, "example 2"],
    context: Context,
) -> Examples:
    """Read the patterns of some heads on the first prompt of every domain."""
    mask = context.attention_mask
    rows = [int((domains.index == d).nonzero()[0]) for d in range(len(domains.names))]
    n_pos = min(EXAMPLE_POS, tokens.shape[1])
    kept = torch.full((len(rows), n_pos), -1)
    pattern = torch.zeros(len(heads), len(rows), n_pos, n_pos)
    layers = sorted(set(heads[:, 0].tolist()))
    for d, row in enumerate(rows):
        length = n_pos if mask is None else min(n_pos, int(mask[row].sum()))
        prompt = tokens[row, :length]
        kept[d, :length] = prompt
        if not layers:
            continue
        found = model.capture(prompt[None], [Site("pattern", layer) for layer in layers])
        for example, (layer, head) in enumerate(heads.tolist()):
            pattern[example, d, :length, :length] = found[Site("pattern", layer)][0, head]
    return Examples(kept, pattern, token_texts(model.tokenizer, kept))
