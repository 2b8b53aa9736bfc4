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
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.statistics import ColumnMean
from workbench.context import Batch, Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.base import ModelAdapter, Site
from workbench.registry import probe
from workbench.settings import check_settings, setting

PAPER_THRESHOLD = 0.3
MIN_POS = 10
"""Uniform attention scores H_T / T at position 0: 0.314 for T = 9, 0.293 for T = 10."""

# Config and result


@dataclass(frozen=True)
class AttentionSinkConfig:
    """Defaults are the paper's."""

    threshold: float | None = setting(
        None,
        "a score above this is a sink; none: the paper's 0.3, and prompts under 10 tokens are refused",
        low=0.0,
        high=1.0,
        exclusive=True,
    )
    position: int = setting(
        0, "the key position that is judged, counted from 0", low=0, unit="tokens"
    )
    inputs: str = setting(
        "natural",
        "the prompts as they are, random ids, one id repeated, or repeated with positions swapped",
        choices=("natural", "random", "repeat", "swap"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.inputs == "swap" and self.position == 0:
            raise ConfigError(
                "inputs=swap swaps the position embeddings of 0 and position, so position must be at "
                "least 1; got 0; set e.g. position=5"
            )

    @property
    def bound(self) -> float:
        """The threshold that is used."""
        return PAPER_THRESHOLD if self.threshold is None else self.threshold


@dataclass(frozen=True)
class AttentionSinkResult:
    """Sink scores and norms of one model on one set of prompts; NaN past a prompt's end."""

    score: Float[Tensor, "batch layer head pos"]
    """alpha, in [0, 1]."""
    key_norm: Float[Tensor, "layer kv_head pos"]
    """Mean over prompts of |k| (after rotary, which keeps norms)."""
    value_norm: Float[Tensor, "layer kv_head pos"]
    """Mean over prompts of |v|."""
    ov_norm: Float[Tensor, "layer head pos"]
    """Mean over prompts of |v W_O|."""
    resid_norm: Float[Tensor, "entry_and_layer pos"]
    """Mean over prompts of |h|: at the entry, then after each block, before the final norm."""
    qk_cosine: Float[Tensor, "layer head pos"]
    """Mean over prompts and queries t >= pos of cos(q_t, k_pos)."""
    qk_norm_product: Float[Tensor, "layer head pos"]
    """Mean over prompts and queries t >= pos of |q_t| |k_pos|."""
    config: AttentionSinkConfig = field(default_factory=AttentionSinkConfig)

    def is_sink(self) -> Tensor:
        """``[batch layer head]``: the score at the judged position is above the threshold."""
        return self.score[..., self.config.position] > self.config.bound

    def sink_rate(self, pos: int | None = None) -> float:
        """Share of (prompt, layer, head) triples whose sink is at ``pos``, in [0, 1]."""
        pos = self.config.position if pos is None else pos
        return (self.score[..., pos] > self.config.bound).float().mean().item()

    def sink_heads(self) -> list[tuple[int, int]]:
        """(layer, head) pairs that sink at the judged position on every prompt."""
        return [(layer, head) for layer, head in self.is_sink().all(dim=0).nonzero().tolist()]

    def metrics(self) -> dict[str, float]:
        """The headline numbers; see the module's docstring."""
        pos, n_pos = self.config.position, self.score.shape[-1]
        found = {
            "sink_rate": self.sink_rate(),
            "mean_score": self.score[..., pos].mean().item(),
            "value_drain": value_drain(self.ov_norm, pos),
            "resid_peak_ratio": peak_ratio(self.resid_norm, pos).max().item(),
            "n_prompts": float(self.score.shape[0]),
            "n_pos": float(n_pos),
        }
        if self.config.inputs == "swap":
            found["sink_rate_at_0"] = self.sink_rate(0)
        return found

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a head: how often it sinks, how much it attends, how far its value is drained."""
        pos = self.config.position
        n_layers, n_heads = self.score.shape[1:3]
        layers = torch.arange(n_layers).repeat_interleave(n_heads)
        return {
            "layer": layers.tolist(),
            "head": torch.arange(n_heads).repeat(n_layers).tolist(),
            "sink_rate": self.is_sink().float().mean(dim=0).flatten().tolist(),
            "mean_score": self.score[..., pos].mean(dim=0).flatten().tolist(),
            "ov_norm_ratio": peak_ratio(self.ov_norm, pos).flatten().tolist(),
            "qk_cosine": self.qk_cosine[..., pos].flatten().tolist(),
            "qk_norm_product": self.qk_norm_product[..., pos].flatten().tolist(),
        }


# Mathematics: tensors in, tensors out


def attention_received(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
) -> Float[Tensor, "batch head k_pos"]:
    """Mean attention each key receives from the queries that can see it; the plain definition."""
    n_pos = pattern.shape[-1]
    n_queries = torch.arange(n_pos, 0, -1, device=pattern.device)
    return pattern.sum(dim=-2) / n_queries


def peak_ratio(norm: Float[Tensor, "... pos"], pos: int) -> Float[Tensor, "..."]:
    """The norm at one position over its mean at all others (NaN entries left out)."""
    others = torch.cat([norm[..., :pos], norm[..., pos + 1 :]], dim=-1)
    return norm[..., pos] / others.nanmean(dim=-1)


def value_drain(ov_norm: Float[Tensor, "layer head pos"], pos: int) -> float:
    """Mean |v W_O| of all heads at one position over its mean elsewhere."""
    return peak_ratio(ov_norm.mean(dim=(0, 1)), pos).item()


def ov_norms(
    value: Float[Tensor, "batch pos kv_head d_head"], gram: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "batch head pos"]:
    """|v W_O| per query head, from the Gram matrices W_O W_O^T: never batch x pos x head x d_model."""
    value = value.float().repeat_interleave(gram.shape[0] // value.shape[2], dim=2)
    squared = torch.einsum("bphd,hde,bphe->bhp", value, gram, value)
    return squared.clamp(min=0).sqrt()


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
    grams = [_gram(model.weight("W_O", layer)) for layer in range(model.spec.n_layers)]
    collected = context.each_batch(tokens, partial(_measure_batch, model, config, grams))
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


def _gram(w_o: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    return w_o @ w_o.transpose(-1, -2)


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
            drained = ov_norms(value, gram.to(value.device))
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
