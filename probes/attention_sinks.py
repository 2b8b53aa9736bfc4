"""Attention sinks: heads that send most of their attention to one early key.

For a causal pattern A over T positions, the score of key k is the mean attention it receives
from the queries at or after it (positions count from 0):

    alpha[k] = 1/(T - k) * sum over q >= k of A[q, k]

A head has a sink at k when alpha[k] > threshold. The sink rate is the share of (prompt, layer,
head) triples that do: each prompt is thresholded first, then averaged. Beside it:

* key, value and output norms: |k|, |v| per key-value head and |v W_O| per head. A sink drains
  value: its |v W_O| is small.
* massive activations: |h| at each position, at the entry and after every block.
* the q.k decomposition: q_t . k_j = |q_t| |k_j| cos(q_t, k_j), averaged over the queries t >= j.
  A sink is driven by the cosine, not by the norms.

Inputs: natural text; random ids; one random id repeated; and, for learned positions, the repeated
id with the position embeddings of 0 and ``position`` swapped (the sink follows the embedding).

Paper: Gu et al. 2024, "When Attention Sink Emerges in Language Models", arXiv:2410.10781.
They count positions from 1 and keep patterns of 64 tokens; here column sums are streamed.
"""

from collections import deque
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention_sinks_results import (
    MIN_POS,
    PAPER_THRESHOLD,
    AttentionSinkConfig,
    AttentionSinkResult,
)
from workbench.attention.statistics import ColumnMean
from workbench.attention.written import output_grams, written_norm
from workbench.context import Batch, Context
from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter, Site
from workbench.registry import probe

# Mathematics: tensors in, tensors out


def queries_after(
    query: Float[Tensor, "batch pos head d_head"], valid: Float[Tensor, "batch pos"] | None
) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos head"]]:
    """Means over the queries at or after each position: of q / |q|, and of |q|."""
    norm = query.float().norm(dim=-1)
    unit = query.float() / norm.clamp(min=1e-12)[..., None]
    if valid is None:
        valid = torch.ones(query.shape[:2], device=query.device)
    count = _sum_after(valid).clamp(min=1.0)
    weight = valid.to(query.device)
    direction = _sum_after(unit * weight[..., None, None]) / count[..., None, None]
    return direction, _sum_after(norm * weight[..., None]) / count[..., None]


def _sum_after(x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch pos *rest"]:
    return x.flip(1).cumsum(1).flip(1)


def decompose(
    direction: Float[Tensor, "batch pos head d_head"],
    length: Float[Tensor, "batch pos head"],
    key: Float[Tensor, "batch pos kv_head d_head"],
) -> dict[str, Float[Tensor, "batch head pos"]]:
    """Mean cosine and mean norm product of each key with the queries at or after it."""
    key = key.float().repeat_interleave(direction.shape[2] // key.shape[2], dim=2)
    norm = key.norm(dim=-1)
    cosine = (direction * key).sum(dim=-1) / norm.clamp(min=1e-12)
    return {"cosine": cosine.transpose(1, 2), "product": (length * norm).transpose(1, 2)}


def swap_positions(n_pos: int, position: int) -> Int[Tensor, " pos"]:
    """Position ids 0 ... n_pos - 1 with 0 and ``position`` exchanged."""
    ids = torch.arange(n_pos)
    ids[0], ids[position] = position, 0
    return ids


# Measurement


@probe(
    "attention-sinks",
    config=AttentionSinkConfig,
    result=AttentionSinkResult,
    paper="arXiv:2410.10781",
    needs={"capture", "attention", "streaming", "weights"},
)
def measure_attention_sinks(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: AttentionSinkConfig,
    context: Context | None = None,
) -> AttentionSinkResult:
    """Score how much attention each key position receives, with the norms behind it."""
    context = context or Context()
    _check_prompts(model, tokens, config, context)
    tokens = make_inputs(tokens, config, model.spec.d_vocab, context)
    measure = partial(_measure_batch, model, config, output_grams(model))
    collected = context.each_batch(tokens, measure)
    lengths = _lengths(tokens, context)
    past_end = torch.arange(tokens.shape[1]) >= lengths[:, None]
    score = torch.cat([found["score"] for found in collected])

    def mean(name: str) -> Tensor:
        whole = torch.cat([found[name] for found in collected])
        hidden = past_end.view(len(whole), *[1] * (whole.dim() - 2), -1)
        return whole.masked_fill(hidden, torch.nan).nanmean(dim=0)

    return AttentionSinkResult(
        score.masked_fill(past_end[:, None, None], torch.nan),
        mean("key_norm"),
        mean("value_norm"),
        mean("ov_norm"),
        mean("resid_norm"),
        mean("qk_cosine"),
        mean("qk_norm_product"),
        config,
    )


def make_inputs(
    tokens: Int[Tensor, "batch pos"], config: AttentionSinkConfig, d_vocab: int, context: Context
) -> Int[Tensor, "batch pos"]:
    """The prompts, or random or repeated ids of the same shape (card section 2)."""
    if config.inputs == "natural":
        return tokens
    shape = tokens.shape if config.inputs == "random" else (tokens.shape[0], 1)
    ids = torch.randint(d_vocab, tuple(shape), generator=context.generator())
    return ids.expand(tokens.shape).contiguous()


def _lengths(tokens: Int[Tensor, "batch pos"], context: Context) -> Int[Tensor, " batch"]:
    if context.attention_mask is None:
        return torch.full((tokens.shape[0],), tokens.shape[1])
    return context.attention_mask.sum(dim=1)


def _check_prompts(
    model: ModelAdapter, tokens: Tensor, config: AttentionSinkConfig, context: Context
) -> None:
    lengths = _lengths(tokens, context)
    row, shortest = int(lengths.argmin()), int(lengths.min())
    if config.threshold is None and shortest < MIN_POS:
        raise DataError(
            f"prompts must have at least {MIN_POS} tokens, because uniform attention already scores "
            f"above {PAPER_THRESHOLD} below that; prompt {row} has {shortest}; leave it out, or set "
            "threshold=... yourself"
        )
    if shortest - config.position < 1.0 / config.bound:
        raise DataError(
            f"position must be at least {1.0 / config.bound:.0f} tokens before a prompt's end, because "
            f"a key there scores above {config.bound} from its own query alone; prompt {row} has "
            f"{shortest} tokens and position is {config.position}; use longer prompts"
        )
    if config.inputs == "swap" and not (
        model.spec.positions == "learned" and "positions" in model.capabilities
    ):
        raise CapabilityError(
            f"inputs=swap needs learned position embeddings and a backend that takes position ids; "
            f"{model.spec.name} on {model.backend} has {model.spec.positions} positions; use a GPT-2 or "
            "OPT model on the hf backend"
        )


def _measure_batch(
    model: ModelAdapter, config: AttentionSinkConfig, grams: list[Tensor], batch: Batch
) -> dict[str, Tensor]:
    """One forward pass; every entry is ``[batch ... pos]``."""
    layers = range(model.spec.n_layers)
    mask = batch.attention_mask
    valid = None if mask is None else mask.float()
    # Queries of a layer wait here for its keys; the two never leave the forward pass whole.
    waiting: deque[tuple[Tensor, Tensor]] = deque()

    def norm(activation: Tensor) -> Tensor:
        return activation.float().norm(dim=-1)

    def read_query(query: Tensor) -> None:
        waiting.append(queries_after(query, valid))

    def read_key(key: Tensor) -> dict[str, Tensor]:
        parts = decompose(*waiting.popleft(), key) | {"norm": norm(key).transpose(1, 2)}
        return {name: part.cpu() for name, part in parts.items()}

    def read_value(gram: Tensor):  # type: ignore[no-untyped-def]
        def read(value: Tensor) -> dict[str, Tensor]:
            drained = written_norm(value, gram.to(value.device))
            return {"norm": norm(value).transpose(1, 2).cpu(), "ov": drained.cpu()}

        return read

    reduce = {"pattern": ColumnMean(), "q": read_query, "k": read_key}
    reduce |= dict.fromkeys(("resid_pre", "resid_post"), norm)
    reduce |= {Site("v", layer): read_value(grams[layer]) for layer in layers}
    # q before k: see ``waiting``.
    names = ("pattern", "q", "k", "v", "resid_post")
    sites = [Site("resid_pre", 0)] + [Site(name, layer) for layer in layers for name in names]
    found = model.capture(
        batch.tokens, sites, reduce, attention_mask=mask, position_ids=_position_ids(batch, config)
    )

    def stack(name: str, part: str | None = None) -> Tensor:
        rows = [found[Site(name, layer)] for layer in layers]
        return torch.stack([row if part is None else row[part] for row in rows], dim=1)

    return {
        "score": stack("pattern"),
        "key_norm": stack("k", "norm"),
        "value_norm": stack("v", "norm"),
        "ov_norm": stack("v", "ov"),
        "qk_cosine": stack("k", "cosine"),
        "qk_norm_product": stack("k", "product"),
        "resid_norm": torch.cat([found[Site("resid_pre", 0)][:, None], stack("resid_post")], dim=1),
    }


def _position_ids(batch: Batch, config: AttentionSinkConfig) -> Int[Tensor, "batch pos"] | None:
    if config.inputs != "swap":
        return None
    return swap_positions(batch.tokens.shape[1], config.position).expand(batch.tokens.shape)
