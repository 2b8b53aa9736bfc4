"""What is measured on a Bigram-Backcopy model: sinks, norms and risks.

With A the attention, S the scores before the kernel, positions counted from 0, and queries taken
at characters that are no triggers, from position 2 on (at 0 and 1 there is nothing to compare):

* sink attention: mean of A[n, 0];
* sink logit gap: mean of S[n, 0] - mean over 1 <= j < n of S[n, j];
* value norm: |W_O W_V LN(h)| of <s>, and its mean over all other positions;
* stationary value norm: |mean of sum over j >= 1 of A[n, j] W_O W_V LN(h_j)| over the mean of A[n, 0],
  which is what theory lets the value norm of <s> come to (``toy_tasks.bigram_backcopy_theory``: the
  head then adds nothing on average; a constant over the vocabulary is not taken off here);
* residual norm: |h| of <s>, and its mean over all other positions;
* excess risks after triggers (backcopy) and elsewhere (bigram), against the exact oracle.

Paper: Guo et al. 2024, arXiv:2410.13835. Their averages contain positions 0 (where A is 1) and 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toy_tasks.bigram_law import BigramLaw, excess_risk, oracle, split_risk
from toy_tasks.model import NORMALISED, Tap, ToyModel, leave, n_learned_keys
from workbench.attention.statistics import sink_logit_gap
from workbench.models.base import Site

MIN_SINK = 0.01
"""Below it a head has no sink whose value could come to rest."""


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
    spread_by_layer: Float[Tensor, "layer 2"]
    """Standard deviation over tokens v, weighted by how often they ask, of the mean score at <s> of
    queries v; and of the other scores, as in ``other_logit_std``."""
    bias_attention: float
    """Mean attention to a learned key; 0 without one."""
    ov_norm_by_layer: Float[Tensor, "layer pos"]
    """Mean over rows and heads."""
    stationary_norm: Float[Tensor, "layer head"]
    """NaN where less than ``MIN_SINK`` of the attention goes to <s>."""
    resid_norm: Float[Tensor, "depth pos"]
    """Mean over rows; at the entry, then after each block."""
    backcopy_risk: float
    bigram_risk: float
    pattern: Float[Tensor, "layer head q_pos k_pos"]
    """Of the first row."""

    @property
    def ov_norm(self) -> Float[Tensor, " pos"]:
        """Mean over rows, layers and heads."""
        return self.ov_norm_by_layer.mean(dim=0)


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
    """``sink_logit_gap``, with 0 at queries 0 and 1, which have none."""
    return torch.nn.functional.pad(sink_logit_gap(scores)[..., 2:], (2, 0))


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


def token_spread(
    scores: Float[Tensor, "row head q_pos k_pos"],
    tokens: Int[Tensor, "row q_pos"],
    where: Bool[Tensor, "row q_pos"],
) -> float:
    """Standard deviation over chosen queries of their token's mean score at <s>, mean over heads."""
    d_vocab = int(tokens.max()) + 1
    means = [
        mean_by_token(head, tokens, where, d_vocab)[tokens[where]].std()
        for head in scores[..., 0].unbind(dim=1)
    ]
    return torch.stack(means).mean().item()


def ov_norm(
    v: Float[Tensor, "row pos head d_head"], w_o: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, " pos"]:
    """Norm of the values after W_O, mean over rows and heads."""
    # From Gram matrices: never rows x pos x heads x d_model.
    squared = torch.einsum("bphd,hde,bphe->bph", v, w_o @ w_o.transpose(1, 2), v)
    return squared.clamp(min=0).sqrt().mean(dim=(0, 2))


def stationary_norm(
    pattern: Float[Tensor, "row head q_pos k_pos"],
    v: Float[Tensor, "row k_pos head d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    where: Bool[Tensor, "row q_pos"],
) -> Float[Tensor, " head"]:
    """Norm that the value of <s> must have to cancel what the other tokens add on average."""
    rest = torch.einsum("bhqk,bkhd->bqhd", pattern[..., 1:], v[:, 1:])[where].mean(dim=0)
    sink = mean_at(pattern[..., 0], where)
    needed = torch.einsum("hd,hde->he", rest, w_o).norm(dim=-1) / sink
    return torch.where(sink >= MIN_SINK, needed, torch.nan)


# One forward pass


def ask(model: ToyModel, held_out: HeldOut, tap: Tap = leave) -> tuple[float, float]:
    """Excess backcopy and bigram risk of the model under a tap."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(held_out.tokens.to(device), tap=tap).logits
    risk = excess_risk(logits.log_softmax(dim=-1).cpu(), held_out.truth)
    return split_risk(risk, held_out.law, held_out.tokens)


def observe(model: ToyModel, held_out: HeldOut, tap: Tap = leave) -> Observed:
    """Measure one model, under a tap."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> Tensor:
        changed = tap(site, x)
        if site.name in ("attn_scores", "pattern", "v", "resid_pre", "resid_post"):
            seen[site] = changed.float().cpu()
        return changed

    backcopy, bigram = ask(model, held_out, keep)
    layers, where = range(model.config.n_layers), held_out.judged()
    scores, patterns, values = (
        [seen[Site(name, layer)] for layer in layers] for name in ("attn_scores", "pattern", "v")
    )
    gaps = [logit_gap(of_layer) for of_layer in scores]
    spreads = [logit_spread(of_layer, where) for of_layer in scores]
    by_tokens = [token_spread(of_layer, held_out.tokens, where) for of_layer in scores]
    spread = torch.tensor(
        [[ours, *theirs] for ours, theirs in zip(by_tokens, spreads, strict=True)]
    )
    by_token = torch.stack(gaps).mean(dim=(0, 2))
    w_o = [weight_by_head(model, "W_O", layer) for layer in layers]
    return Observed(
        sink_attention=torch.stack([mean_at(pattern[..., 0], where) for pattern in patterns]),
        sink_logit_gap=torch.stack([mean_at(gap, where) for gap in gaps]),
        gap_by_token=mean_by_token(by_token, held_out.tokens, where, held_out.law.d_vocab),
        sink_logit_std=spread[:, 1].mean().item(),
        other_logit_std=spread[:, 2].mean().item(),
        spread_by_layer=spread[:, [0, 2]],
        bias_attention=_bias_attention(model, patterns, where),
        ov_norm_by_layer=torch.stack(list(map(ov_norm, values, w_o))),
        stationary_norm=torch.stack(
            [stationary_norm(*parts, where) for parts in zip(patterns, values, w_o, strict=True)]
        ),
        resid_norm=_resid_norms(seen, len(layers)),
        backcopy_risk=backcopy,
        bigram_risk=bigram,
        pattern=torch.stack([pattern[0] for pattern in patterns]),
    )


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
