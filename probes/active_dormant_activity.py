"""What a head does on a prompt: sink attention, sink logits, entropies, and the norms it writes.

All are means over the queries n >= 2 of one prompt (positions count from 0): query 0 sees the first
token only, and query 1 has no third key to compare it with. With A the pattern, S the scores before
softmax, v W_O what a head would write for a key, h the residual stream:

    sink attention   A[n, 0]
    sink-logit gap   S[n, 0] - mean over 1 <= j < n of S[n, j]
    row entropy      H(A[n, :]) / log(n + 1)
    column entropy   H(c) / log T,  c[k] = sum over n of A[n, k], over its sum

Patterns are read block by block and never kept.

Paper: Guo et al. 2024, arXiv:2410.13835; their averages contain queries 0 (where A is 1) and 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit
from workbench.attention.statistics import (
    ColumnMean,
    RowEntropy,
    SinkLogitGap,
    SinkMass,
    sink_logit_gap,
)
from workbench.attention.written import written_norm
from workbench.context import Batch
from workbench.models.base import ModelAdapter, ModelSpec, Site

FIRST_QUERY = 2
"""The first query that a mean is taken over."""
MIN_POS = FIRST_QUERY + 1
PARTS = ("attention", "MLP")

# Mathematics


def mean_over_queries(
    x: Float[Tensor, "prompt head q_pos"], valid: Float[Tensor, "prompt q_pos"]
) -> Float[Tensor, "prompt head"]:
    """Mean over a prompt's queries from ``FIRST_QUERY`` on; NaN entries are left out."""
    x = x.float()[..., FIRST_QUERY:]
    counted = valid[:, None, FIRST_QUERY:].expand_as(x) > 0
    return torch.where(counted, x, torch.nan).nanmean(dim=-1)


def row_entropy(
    entropy: Float[Tensor, "prompt head q_pos"],
) -> Float[Tensor, "prompt head q_pos"]:
    """Entropy of each row over that of uniform attention, log(n + 1); NaN for query 0."""
    return entropy / torch.arange(1, entropy.shape[-1] + 1).log()


def column_entropy(
    received: Float[Tensor, "prompt head k_pos"], valid: Float[Tensor, "prompt k_pos"]
) -> Float[Tensor, "prompt head"]:
    """Entropy of the share of attention that each key receives, over log T; 0: one key gets all.

    Args:
        received: Mean attention over the queries at or after each key, as ``ColumnMean`` gives it.
        valid: 1 for real tokens.
    """
    after = valid.flip(-1).cumsum(-1).flip(-1)
    total = received * after[:, None]
    share = total / total.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(dim=-1) / valid.sum(dim=-1).log()[:, None]


def first_and_rest(
    x: Float[Tensor, "prompt ... pos"], valid: Float[Tensor, "prompt pos"]
) -> tuple[Float[Tensor, "prompt ..."], Float[Tensor, "prompt ..."]]:
    """The value at position 0, and the mean over a prompt's other positions."""
    weight = valid.view(len(x), *[1] * (x.dim() - 2), -1)[..., 1:]
    return x[..., 0], (x[..., 1:] * weight).sum(dim=-1) / weight.sum(dim=-1)


# Measurement


def valid_positions(batch: Batch) -> Float[Tensor, "prompt pos"]:
    """1 for real tokens, 0 for padding."""
    mask = batch.attention_mask
    return torch.ones(batch.tokens.shape) if mask is None else mask.float()


def measure_activity(
    model: ModelAdapter, batch: Batch, gram: list[Tensor]
) -> dict[str, Float[Tensor, "prompt ..."]]:
    """One forward pass: a number a prompt, layer and head; residual norms a prompt and depth."""
    valid, layers = valid_positions(batch), range(model.spec.n_layers)

    def norm(x: Tensor) -> Tensor:
        return x.float().norm(dim=-1).cpu()

    def writes(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda value: written_norm(value, gram[layer].to(value.device)).cpu()

    statistics = {"sink": SinkMass((0,)), "received": ColumnMean(), "entropy": RowEntropy()}
    # A toy's kernel need not be a softmax, so the gap of its scores is no gap of log A.
    reads_scores = model.backend == "toy"
    if not reads_scores:
        statistics["gap"] = SinkLogitGap()
    names = ["pattern", "v", "resid_post"] + ["attn_scores"] * reads_scores
    sites = [Site("resid_pre", 0)] + [Site(name, layer) for layer in layers for name in names]
    reduce = {"pattern": statistics, "attn_scores": sink_logit_gap}
    reduce |= {"resid_pre": norm, "resid_post": norm}
    reduce |= {Site("v", layer): writes(layer) for layer in layers}
    found = model.capture(batch.tokens, sites, reduce, attention_mask=batch.attention_mask)

    def of_pattern(name: str) -> Tensor:
        return torch.stack([found[Site("pattern", layer)][name] for layer in layers], dim=1)

    def mean(x: Tensor) -> Tensor:
        flat = mean_over_queries(x.flatten(1, 2), valid)
        return flat.view(x.shape[:3])

    if reads_scores:
        gap = torch.stack([found[Site("attn_scores", layer)] for layer in layers], dim=1)
    else:
        gap = of_pattern("gap")
    column = [column_entropy(found[Site("pattern", layer)]["received"], valid) for layer in layers]
    written = torch.stack([found[Site("v", layer)] for layer in layers], dim=1)
    resid = [found[Site("resid_pre", 0)], *(found[Site("resid_post", layer)] for layer in layers)]
    value_bos, value_rest = first_and_rest(written, valid)
    resid_bos, resid_rest = first_and_rest(torch.stack(resid, dim=1), valid)
    return {
        "sink": mean(of_pattern("sink")),
        "gap": mean(gap),
        "row_entropy": mean(row_entropy(of_pattern("entropy").flatten(1, 2)).view(gap.shape)),
        "column_entropy": torch.stack(column, dim=1),
        "value_bos": value_bos,
        "value_rest": value_rest,
        "resid_bos": resid_bos,
        "resid_rest": resid_rest,
    }


# Who makes the residual peak


class WithoutPart:
    """Set what one block's attention or MLP adds to the residual stream to zero."""

    name = "without-part"

    def __init__(self, layer: int, part: str) -> None:
        self.site = Site("attn_out" if part == "attention" else "mlp_out", layer)

    def plan(self, spec: ModelSpec) -> list[ActivationEdit]:
        """One edit."""
        return [ActivationEdit(self.site, torch.zeros_like)]


def measure_peaks(
    model: ModelAdapter, first: Int[Tensor, " prompt"]
) -> Float[Tensor, "prompt part layer"]:
    """The largest norm over depth at position 0, with one block's attention or MLP zeroed.

    Position 0 sees nothing but itself, so prompts of that one token say all. NaN for the MLP of a
    model that has none.
    """
    tokens, place = first.unique(return_inverse=True)
    layers = range(model.spec.n_layers)
    sites = [Site("resid_pre", 0)] + [Site("resid_post", layer) for layer in layers]

    def peak() -> Tensor:
        found = model.capture(tokens[:, None], sites, lambda x: x.float().norm(dim=-1)[:, 0])
        return torch.stack([found[site] for site in sites]).amax(dim=0)

    peaks = torch.full((len(tokens), len(PARTS), len(layers)), torch.nan)
    for index, part in enumerate(PARTS):
        if part == "MLP" and not model.spec.d_mlp:
            continue
        for layer in layers:
            with model.edit(WithoutPart(layer, part)):
                peaks[:, index, layer] = peak()
    return peaks[place]
