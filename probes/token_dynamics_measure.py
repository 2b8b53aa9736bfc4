"""Measurement of the walk: one forward pass for its points, one a waypoint for the lens.

What is kept of a batch while it is measured: its waypoints (2 L + 1 vectors a token), its values,
and a few rows of attention; a smaller batch needs less. Nothing is tokens x tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.token_dynamics_concepts import parameterless_attention
from probes.token_dynamics_decoding import measure_decoding
from probes.token_dynamics_lens import TunedLens, arrival, decode, kl_divergence
from probes.token_dynamics_results import TokenDynamicsConfig
from probes.token_dynamics_walk import (
    attribution,
    by_source,
    centred,
    chosen_rows,
    cosine,
    frozen_norm,
    mean_over,
    pair_cosine,
    path_numbers,
    shuffled,
    straightness,
    turning,
    valid_positions,
    waypoints,
)
from workbench.attention.rows import PatternRows
from workbench.attention.statistics import RowEntropy
from workbench.context import Batch
from workbench.interventions.replace import ReplacePositions
from workbench.interventions.uniform import UniformAttention
from workbench.interventions.zero_heads import ZeroHeads
from workbench.models.base import ModelAdapter, Site

LOGIT_FLOATS = 1 << 25
"""Logits held at once (128 MiB); prompts are decoded in groups that keep to it."""
_POST_NORM = ("gemma2", "gemma3_text", "olmo2")
"""Families whose attn_out is what an RMS norm makes of the heads' sum."""


@dataclass(frozen=True)
class Plan:
    """What is the same for every batch."""

    config: TokenDynamicsConfig
    lens: TunedLens | None
    order: Int[Tensor, " step"]
    """The steps' random order of the null."""

    @property
    def uniform(self) -> UniformAttention:
        """The baseline that attention is compared with."""
        return UniformAttention(skip_first=self.config.baseline == "uniform-no-bos")


def measure_batch(model: ModelAdapter, batch: Batch, plan: Plan) -> dict[str, Tensor]:
    """Every array of the walk for one batch, the prompts first."""
    valid = valid_positions(batch.tokens, batch.attention_mask)
    weight = valid.float()
    weight[:, 0] = 0.0
    queries = _query_positions(valid, plan.config.queries)
    seen = _capture(model, batch, queries)
    path = waypoints(seen.entry, seen.attn_out, seen.mlp_out)
    numbers = path_numbers(path) | {"straight_raw": straightness(path)}
    found = {name: _hide(x, valid) for name, x in numbers.items()}
    found |= {
        "telescoping_error": _telescoping_error(path[-1], seen.end, valid),
        "turning_null": mean_over(turning(shuffled(path, plan.order)), weight),
        "pair_cosine": pair_cosine(path, weight),
        "entropy_gap": _entropy_gap(seen.entropy, weight),
        "association_bias": _association_bias(model, batch, plan, path, seen.attn_out, weight),
    }
    found |= _attribution(model, seen, queries)
    found |= _view("raw", path, weight) | _view("centred", centred(path, weight), weight)
    found["straight_centred"] = _hide(straightness(centred(path, weight)), valid)
    rows = max(1, LOGIT_FLOATS // (batch.tokens.shape[1] * model.spec.d_vocab))
    groups = [slice(start, start + rows) for start in range(0, len(valid), rows)]
    parts = [_decoded(model, _part(batch, group), path[:, group], plan) for group in groups]
    return found | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _part(batch: Batch, rows: slice) -> Batch:
    mask = batch.attention_mask
    return Batch(batch.tokens[rows], None if mask is None else mask[rows], batch.start + rows.start)


def _hide(x: Float[Tensor, "batch pos *rest"], valid: Bool[Tensor, "batch pos"]) -> Tensor:
    return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), torch.nan)


def _query_positions(
    valid: Bool[Tensor, "batch pos"], queries: tuple[int, ...]
) -> Int[Tensor, "batch query"]:
    lengths = valid.sum(dim=1, keepdim=True)
    asked = torch.tensor(queries)
    return torch.where(asked < 0, lengths + asked, asked.expand(len(lengths), -1))


# The walk itself


@dataclass(frozen=True)
class _Seen:
    """What one forward pass showed."""

    entry: Tensor
    attn_out: list[Tensor]
    mlp_out: list[Tensor]
    end: Tensor
    values: list[Tensor]
    rows: list[Tensor]
    entropy: list[Tensor]


def _capture(model: ModelAdapter, batch: Batch, queries: Int[Tensor, "batch query"]) -> _Seen:
    layers = range(model.spec.n_layers)
    reduce = {"pattern": {"rows": PatternRows(queries), "entropy": RowEntropy()}}
    entry, end = Site("resid_pre", 0), Site("resid_post", layers[-1])
    # Toy models may have no MLP: its steps are zero.
    names = ("v", "pattern", "attn_out") + (("mlp_out",) if model.spec.d_mlp else ())
    sites = [entry, *(Site(name, layer) for layer in layers for name in names), end]
    found = model.capture(batch.tokens, sites, reduce, attention_mask=batch.attention_mask)

    def all_of(name: str) -> list[Any]:
        return [found[Site(name, layer)] for layer in layers]

    patterns = all_of("pattern")
    return _Seen(
        found[entry],
        all_of("attn_out"),
        all_of("mlp_out") if model.spec.d_mlp else [torch.zeros_like(found[entry])] * len(layers),
        found[end],
        all_of("v"),
        [pattern["rows"].cpu() for pattern in patterns],
        [pattern["entropy"].cpu() for pattern in patterns],
    )


def _telescoping_error(
    walked: Float[Tensor, "batch pos d_model"],
    end: Float[Tensor, "batch pos d_model"],
    valid: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    error = (walked - end).norm(dim=-1) / end.norm(dim=-1).clamp(min=1e-12)
    return error.masked_fill(~valid, 0.0).amax(dim=1)


def _entropy_gap(
    entropy: list[Float[Tensor, "batch head pos"]], weight: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch layer"]:
    uniform = torch.log(torch.arange(1.0, weight.shape[1] + 1))
    gaps = [uniform - layer.mean(dim=1) for layer in entropy]
    return torch.stack([mean_over(gap, weight) for gap in gaps], dim=1)


def _view(
    name: str, path: Float[Tensor, "waypoint batch pos d"], weight: Float[Tensor, "batch pos"]
) -> dict[str, Tensor]:
    to_end = cosine(path, path[-1:].expand_as(path)).movedim(0, -1)
    return {
        f"cosine_{name}": mean_over(to_end, weight),
        f"turning_{name}": mean_over(turning(path), weight),
    }


# Attention against its baseline, and by source token


def _association_bias(
    model: ModelAdapter,
    batch: Batch,
    plan: Plan,
    path: Float[Tensor, "waypoint batch pos d_model"],
    attn_out: list[Float[Tensor, "batch pos d_model"]],
    weight: Float[Tensor, "batch pos"],
) -> Float[Tensor, "batch layer"]:
    """All layers in one pass: each is given its own clean input, so that no bias reaches the next."""
    layers = range(model.spec.n_layers)
    nothing = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    clean = [ReplacePositions(f"L{layer}.resid_pre", nothing, path[2 * layer]) for layer in layers]
    strengths = {Site("attn_out", layer): _strength(attn_out[layer], weight) for layer in layers}
    with model.edit(plan.uniform, *clean):
        found = model.capture(
            batch.tokens, list(strengths), strengths, attention_mask=batch.attention_mask
        )
    return torch.stack([found[site] for site in strengths], dim=1)


def _strength(attn_out: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
    def reduce(uniform: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        beta = (attn_out - uniform.float().cpu()).norm(dim=-1)
        return mean_over(beta / attn_out.norm(dim=-1).clamp(min=1e-12), weight)

    return reduce


def _attribution(
    model: ModelAdapter, seen: _Seen, queries: Int[Tensor, "batch query"]
) -> dict[str, Tensor]:
    layers = []
    for layer, rows in enumerate(seen.rows):
        written = by_source(rows, seen.values[layer], model.weight("W_O", layer))
        out = chosen_rows(seen.attn_out[layer], queries)
        if model.spec.family in _POST_NORM:
            written = frozen_norm(written, out)
        layers.append(attribution(written, out))
    return {
        f"attribution_{name}": torch.stack([layer[name] for layer in layers], dim=2)
        for name in layers[0]
    }


# What the waypoints and the baselines predict


def _decoded(
    model: ModelAdapter,
    batch: Batch,
    path: Float[Tensor, "waypoint batch pos d_model"],
    plan: Plan,
) -> dict[str, Tensor]:
    """Everything that needs logits, for a few prompts."""
    tokens, mask = batch.tokens, batch.attention_mask
    valid = valid_positions(tokens, mask)
    weight = valid.float()
    weight[:, 0] = 0.0
    logits = model.logits(tokens, mask)
    top, full = logits.argmax(dim=-1), logits.log_softmax(dim=-1)
    del logits
    first, distance, normed = [], [], []
    for point in path:
        log_q, vector = decode(model, point, mask)
        first.append(log_q.argmax(dim=-1) == top)
        distance.append(mean_over(kl_divergence(full, log_q), weight))
        normed.append(vector)
    stays, path_normed = torch.stack(first, dim=-1), torch.stack(normed)
    found = {
        "arrival": _hide(arrival(stays).float(), valid),
        "lens_agreement": mean_over(stays.float(), weight),
        "lens_kl": torch.stack(distance, dim=1),
        "straight_normed": _hide(straightness(path_normed), valid),
    }
    if plan.lens is not None:
        lens = plan.lens
        tuned = [decode(model, lens(path[2 * i], i), mask)[0] for i in range(model.spec.n_layers)]
        found["tuned_kl"] = torch.stack(
            [mean_over(kl_divergence(full, log_q), weight) for log_q in tuned], dim=1
        )
    found |= _view("normed", path_normed, weight)
    if plan.config.new_tokens:
        found |= measure_decoding(model, batch, plan.config.new_tokens, model.weight("W_U"))
    return found | _baselines(model, batch, plan, full, weight)


def _baselines(
    model: ModelAdapter,
    batch: Batch,
    plan: Plan,
    full: Float[Tensor, "batch pos d_vocab"],
    weight: Float[Tensor, "batch pos"],
) -> dict[str, Tensor]:
    tokens, mask, spec = batch.tokens, batch.attention_mask, model.spec
    with model.edit(plan.uniform):
        uniform = model.logits(tokens, mask).log_softmax(dim=-1)
    every = tuple((layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads))
    with model.edit(ZeroHeads(every)):
        zero = model.logits(tokens, mask).log_softmax(dim=-1)
    embed = model.capture(tokens, [Site("embed")], attention_mask=mask)[Site("embed")]
    without = (parameterless_attention(embed) @ model.weight("W_U")).log_softmax(dim=-1)
    agreement = (uniform.argmax(dim=-1) == full.argmax(dim=-1)).float()
    return {
        "kl_uniform": mean_over(kl_divergence(full, uniform), weight),
        "kl_zero": mean_over(kl_divergence(full, zero), weight),
        "kl_parameterless": mean_over(kl_divergence(full, without), weight),
        "agreement_uniform": mean_over(agreement, weight),
        "loss": torch.stack([next_token_loss(x, tokens, weight) for x in (full, uniform, zero)], 1),
    }


def next_token_loss(
    log_p: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    weight: Float[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """Mean loss in nats of every token after the first, given those before it."""
    loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return mean_over(loss, weight[:, 1:])
