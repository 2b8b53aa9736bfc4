"""What is measured on a Bigram-Backcopy model: sinks, norms, risks, and risks under ablation.

With A the attention, S the scores before the kernel, positions counted from 0, and queries taken
at characters that are no triggers, from position 2 on (at 0 and 1 there is nothing to compare):

* sink attention: mean of A[n, 0];
* sink logit gap: mean of S[n, 0] - mean over 1 <= j < n of S[n, j];
* value norm: |W_O W_V LN(h)| of <s>, and its mean over all other positions;
* residual norm: |h| of <s>, and its mean over all other positions;
* excess risks after triggers (backcopy) and elsewhere (bigram), against the exact oracle.

Paper: Guo et al. 2024, arXiv:2410.13835. Their averages contain positions 0 (where A is 1) and 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toy_tasks.bigram_law import BigramLaw, excess_risk, oracle, split_risk
from toy_tasks.model import NORMALISED, WHOLE_PATTERN, Tap, ToyModel, leave, n_learned_keys
from workbench.models.base import Site


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sequences that no training step sees, with the truth about them."""

    law: BigramLaw
    tokens: Int[Tensor, "row pos"]
    """Without the last token, which has no successor."""
    truth: Float[Tensor, "row pos d_vocab"]

    @classmethod
    def of(cls, law: BigramLaw, sequences: Int[Tensor, "row longer"]) -> "HeldOut":
        """Take sequences of one token more than the model reads."""
        tokens = sequences[:, :-1]
        return cls(law, tokens, oracle(law, tokens))

    def judged(self) -> Bool[Tensor, "row pos"]:
        """Queries at which sinks are measured."""
        chosen = ~self.law.is_trigger[self.tokens]
        chosen[:, :2] = False
        return chosen


@dataclass(frozen=True, eq=False)
class Observed:
    """One model on the held-out sequences."""

    sink_attention: Float[Tensor, "layer head"]
    sink_logit_gap: Float[Tensor, "layer head"]
    gap_by_token: Float[Tensor, " d_vocab"]
    """Mean over layers and heads; NaN for tokens that do not occur."""
    sink_logit_std: float
    """Over judged queries, of their score at <s>: small when sink logits are concentrated."""
    other_logit_std: float
    """Over judged queries and keys 1 <= j < n, of their scores."""
    bias_attention: float
    """Mean attention to a learned key; 0 without one."""
    ov_norm: Float[Tensor, " pos"]
    """Mean over rows, layers and heads."""
    resid_norm: Float[Tensor, "depth pos"]
    """Mean over rows; at the entry, then after each block."""
    backcopy_risk: float
    bigram_risk: float


# Mathematics


def mean_at(
    x: Float[Tensor, "row head pos"], where: Bool[Tensor, "row pos"]
) -> Float[Tensor, " head"]:
    """Mean over the chosen rows and positions."""
    weight = where.to(x)[:, None]
    return (x * weight).sum(dim=(0, 2)) / weight.sum()


def logit_gap(
    scores: Float[Tensor, "row head q_pos k_pos"],
) -> Float[Tensor, "row head q_pos"]:
    """Score at key 0 minus the mean score at keys 1 ... n - 1; 0 at queries 0 and 1."""
    n_pos = scores.shape[-1]
    between = torch.ones(n_pos, n_pos, dtype=torch.bool, device=scores.device).tril(-1)
    between[:, 0] = False
    count = between.sum(dim=-1)
    others = scores.masked_fill(~between, 0.0).sum(dim=-1) / count.clamp(min=1)
    return (scores[..., 0] - others) * (count > 0)


def mean_by_token(
    x: Float[Tensor, "row pos"], tokens: Int[Tensor, "row pos"], where: Tensor, d_vocab: int
) -> Float[Tensor, " d_vocab"]:
    """Mean of the chosen entries by their token; NaN where there are none."""
    ids, zero = tokens[where], torch.zeros(d_vocab)
    return zero.index_add(0, ids, x[where]) / torch.bincount(ids, minlength=d_vocab)


def logit_spread(
    scores: Float[Tensor, "row head q_pos k_pos"], where: Bool[Tensor, "row q_pos"]
) -> tuple[float, float]:
    """Standard deviations of the scores at <s> and at the keys 1 <= j < n, over chosen queries."""
    n_pos = scores.shape[-1]
    chosen = scores.transpose(1, 2)[where]
    between = torch.ones(n_pos, n_pos, dtype=torch.bool).tril(-1)
    between[:, 0] = False
    mask = between[where.nonzero()[:, 1]][:, None].expand_as(chosen)
    return chosen[..., 0].std().item(), chosen[mask].std().item()


# One forward pass


def ask(model: ToyModel, held_out: HeldOut, tap: Tap = leave) -> tuple[float, float]:
    """Excess backcopy and bigram risk of the model under a tap."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(held_out.tokens.to(device), tap=tap).logits
    risk = excess_risk(logits.log_softmax(dim=-1).cpu(), held_out.truth)
    return split_risk(risk, held_out.law, held_out.tokens)


def observe(model: ToyModel, held_out: HeldOut) -> Observed:
    """Measure one model."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> Tensor:
        if site.name in ("attn_scores", "pattern", "v", "resid_pre", "resid_post"):
            seen[site] = x.float().cpu()
        return x

    backcopy, bigram = ask(model, held_out, keep)
    layers, where = range(model.config.n_layers), held_out.judged()
    gaps = [logit_gap(seen[Site("attn_scores", layer)]) for layer in layers]
    patterns = [seen[Site("pattern", layer)] for layer in layers]
    ov = [_ov_norm(model, layer, seen[Site("v", layer)]) for layer in layers]
    spreads = [logit_spread(seen[Site("attn_scores", layer)], where) for layer in layers]
    sink_std, other_std = torch.tensor(spreads).mean(dim=0).tolist()
    by_token = torch.stack(gaps).mean(dim=(0, 2))
    return Observed(
        torch.stack([mean_at(pattern[..., 0], where) for pattern in patterns]),
        torch.stack([mean_at(gap, where) for gap in gaps]),
        mean_by_token(by_token, held_out.tokens, where, held_out.law.d_vocab),
        sink_std,
        other_std,
        _bias_attention(model, patterns, where),
        torch.stack(ov).mean(dim=0),
        _resid_norms(seen, len(layers)),
        backcopy,
        bigram,
    )


def _ov_norm(
    model: ToyModel, layer: int, v: Float[Tensor, "row pos head d_head"]
) -> Float[Tensor, " pos"]:
    w_o = weight_by_head(model, "W_O", layer)
    # From Gram matrices: never rows x pos x heads x d_model.
    squared = torch.einsum("bphd,hde,bphe->bph", v, w_o @ w_o.transpose(1, 2), v)
    return squared.clamp(min=0).sqrt().mean(dim=(0, 2))


def weight_by_head(model: ToyModel, name: str, layer: int) -> Float[Tensor, "head a b"]:
    """W_Q, W_K, W_V as ``head d_model d_head``, W_O as ``head d_head d_model``; on the CPU."""
    weight = model.get_parameter(f"blocks.{layer}.attention.{name}.weight").detach().float().cpu()
    n_heads = model.config.n_heads
    if name == "W_O":
        return weight.T.unflatten(0, (n_heads, -1))
    return weight.unflatten(0, (n_heads, -1)).transpose(1, 2)


def _bias_attention(model: ToyModel, patterns: list[Tensor], where: Tensor) -> float:
    if not (n_learned_keys(model.config) and model.config.attention in NORMALISED):
        return 0.0
    left = [mean_at(1.0 - pattern.sum(dim=-1), where) for pattern in patterns]
    return torch.stack(left).mean().item()


def _resid_norms(seen: dict[Site, Tensor], n_layers: int) -> Float[Tensor, "depth pos"]:
    sites = [Site("resid_pre", 0), *(Site("resid_post", layer) for layer in range(n_layers))]
    return torch.stack([seen[site].norm(dim=-1).mean(dim=0) for site in sites])


def over_rest(norm: Float[Tensor, "*depth pos"]) -> Float[Tensor, "*two_and_more"]:
    """The norm at position 0 and its mean over the other positions."""
    return torch.stack([norm[..., 0], norm[..., 1:].mean(dim=-1)])


# Ablations


def ablations(model: ToyModel) -> Iterator[tuple[str, Tap]]:
    """Every ablation of the model, by the name that results give it."""
    for layer in range(model.config.n_layers):
        yield f"no_attention:L{layer}", _skip(Site("attn_out", layer))
    if model.config.d_mlp:
        for layer in range(model.config.n_layers):
            yield f"no_mlp:L{layer}", _skip(Site("mlp_out", layer))
    for kind, make in (("zero_head", _zero_head), ("head_to_bos", _head_to_bos)):
        for layer in range(model.config.n_layers):
            for head in range(model.config.n_heads):
                yield f"{kind}:L{layer}H{head}", make(model, layer, head)


def _skip(skipped: Site) -> Tap:
    return lambda site, x: torch.zeros_like(x) if site == skipped else x


def _zero_head(model: ToyModel, layer: int, head: int) -> Tap:
    def change(x: Tensor) -> Tensor:
        kept = x.clone()
        kept[:, :, head] = 0.0
        return kept

    return _at(Site("z", layer), change)


def _head_to_bos(model: ToyModel, layer: int, head: int) -> Tap:
    """All attention of the head to <s>; a learned token before it keeps its own row."""
    column = n_learned_keys(model.config)
    first_row = int(model.config.bias == "sink-token")

    def change(x: Tensor) -> Tensor:
        moved = x.clone()
        moved[:, head, first_row:] = 0.0
        moved[:, head, first_row:, column] = 1.0
        return moved

    return _at(Site(WHOLE_PATTERN, layer), change)


def _at(changed: Site, change: Callable[[Tensor], Tensor]) -> Tap:
    return lambda site, x: change(x) if site == changed else x


def ask_ablated(
    model: ToyModel, held_out: HeldOut, tap: Tap, depth: int
) -> tuple[float, float, float]:
    """Backcopy risk, bigram risk and residual peak (|h| of <s> over the rest) at a depth."""
    watched = Site("resid_post", depth - 1) if depth else Site("resid_pre", 0)
    peak = torch.nan

    def both(site: Site, x: Tensor) -> Tensor:
        nonlocal peak
        changed = tap(site, x)
        if site == watched:
            bos, rest = over_rest(changed.norm(dim=-1).mean(dim=0))
            peak = (bos / rest).item()
        return changed

    return (*ask(model, held_out, both), peak)
