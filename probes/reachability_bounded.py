"""The bound of ``reachability_bound`` on the heads of a real model, and on a model of one layer.

Heads of layer 0 read the tokens' own embeddings after the norm, so what any control token can be is
known: alpha = |q| max over the vocabulary of |k_u| times the scale of the scores, V the longest value
vector of the vocabulary (at every place a control token can take, where positions are learned). For
each pair and head, at the last position:

* ``head_orthogonal``: how far the control that was found turned the head's output away from its own,
* ``head_limit``: how far it could at most; the first is never above the second,
* ``head_min_k``: the fewest tokens before the head could write the value of the target itself.

Deeper heads read a state that the control has changed, so nothing holds for them.

A model of one layer of attention and no MLP is bounded as a whole: with readout directions r_v of its
final norm and unembedding, the target y never wins when for some other token v the largest value of
(r_y - r_v) . (x + sum over heads of (c yhat + y_u) W_O) over 0 <= c <= 1 and |y_u| <= B(k) is below 0.

Paper: Bhargava et al. 2023, arXiv:2310.04444, section 4; the step to a whole model is ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.reachability_bound import limit, minimal_k, orthogonal_part
from probes.reachability_problems import Problem, State
from workbench.context import Context
from workbench.models.base import ModelAdapter, Site

NEEDS = frozenset({"attention", "patterns"})
READS = tuple(Site(name, 0) for name in ("q", "k", "v", "attn_scores"))
PACKED = 64
"""Tokens of a row when the vocabulary is read."""
READ_AT_ONCE = 1 << 14
"""Tokens of a forward pass then."""


@dataclass(frozen=True)
class Reach:
    """The most any control token can do at layer 0."""

    key: Float[Tensor, " head"]
    """Longest key."""
    value: Float[Tensor, " head"]
    """Longest value."""


@dataclass(frozen=True)
class View:
    """What the last position sees at layer 0, the columns of the control left out."""

    log_d: Float[Tensor, " head"]
    alpha: Float[Tensor, " head"]
    own: Float[Tensor, "head d_head"]
    """The head's output from BOS and state alone."""
    whole: Float[Tensor, "head d_head"]
    """Its output with the control."""


# What a control can do


def vocabulary_reach(model: ModelAdapter, places: Sequence[int]) -> Reach:
    """The longest key and value of layer 0 over the whole vocabulary.

    Args:
        model: With attention.
        places: Positions that control tokens can take; they matter where positions are learned.
    """
    by_place = model.spec.positions == "learned"
    n_pos = max(places) + 1 if by_place else min(PACKED, model.spec.n_ctx)
    rows = _vocabulary_rows(model.spec.d_vocab, n_pos, by_place=by_place)

    def longest(x: Tensor) -> Tensor:
        kept = x[:, list(places)] if by_place else x
        return kept.float().norm(dim=-1).amax(dim=(0, 1)).cpu()

    found = []
    for start in range(0, len(rows), max(1, READ_AT_ONCE // n_pos)):
        batch = rows[start : start + max(1, READ_AT_ONCE // n_pos)]
        seen = model.capture(batch, READS[1:3], {"k": longest, "v": longest})
        found.append(torch.stack([seen[site] for site in READS[1:3]]))
    key, value = torch.stack(found).amax(dim=0)
    repeat = model.spec.n_heads // len(key)
    # Computed in another order elsewhere, so a little room.
    return Reach(*(1.0001 * x.repeat_interleave(repeat) for x in (key, value)))


def _vocabulary_rows(d_vocab: int, n_pos: int, *, by_place: bool) -> Int[Tensor, "row pos"]:
    """Every token once, or at every place."""
    if by_place:
        return torch.arange(d_vocab)[:, None].expand(-1, n_pos)
    return (torch.arange(-(-d_vocab // n_pos) * n_pos) % d_vocab).view(-1, n_pos)


def view_last(
    model: ModelAdapter, state: State, control: Int[Tensor, " k"], reach: Reach
) -> View | None:
    """What the last position sees; None when scores are no multiples of q . k (soft-capped)."""
    n_bos, row = len(state.bos), state.rows(control[None])
    reads: dict[str, Any] = {
        "q": lambda x: x[0, -1].float().cpu(),
        "k": lambda x: x[0].float().cpu(),
        "v": lambda x: x[0].float().cpu(),
        "attn_scores": lambda x: x[0, :, -1].float().cpu(),
    }
    found = model.capture(row, READS, reads)
    q, k, v, scores = (found[site] for site in READS)
    repeat = model.spec.n_heads // k.shape[1]
    keys, values = (x.repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (k, v))
    scale = _scale(torch.einsum("hd,hpd->hp", q, keys), scores)
    if scale is None:
        return None
    kept = torch.ones(row.shape[1], dtype=torch.bool)
    kept[n_bos : n_bos + len(control)] = False
    own = scores[:, kept].softmax(dim=-1)[:, None] @ values[:, kept]
    whole = scores.softmax(dim=-1)[:, None] @ values
    alpha = scale * q.norm(dim=-1) * reach.key
    return View(scores[:, kept].logsumexp(dim=-1), alpha, own[:, 0], whole[:, 0])


def _scale(products: Float[Tensor, "head pos"], scores: Float[Tensor, "head pos"]) -> float | None:
    """The factor from q . k to scores, the same everywhere (hidden positions aside)."""
    seen = scores > -1e9
    x, y = products[seen].double(), scores[seen].double()
    scale = float((x * y).sum() / (x * x).sum().clamp_min(1e-30))
    error = float((y - scale * x).abs().max())
    return scale if error <= 1e-3 * max(1.0, float(y.abs().max())) else None


# Heads of a real model


def head_bounds(
    model: ModelAdapter,
    problems: Sequence[Problem],
    k: Int[Tensor, " pair"],
    prompts: Sequence[Int[Tensor, " _"]],
    context: Context,
) -> dict[str, Tensor]:
    """Found against possible for each pair and head of layer 0; {} where heads cannot be read."""
    if not model.capabilities >= NEEDS or not model.spec.n_heads or _has_further_keys(model):
        return {}

    def measure() -> dict[str, Tensor]:
        longest = max((len(prompt) for prompt in prompts), default=0)
        n_bos = max(len(problem.state.bos) for problem in problems)
        reach = vocabulary_reach(model, range(n_bos + max(longest, 1)))
        views = [
            view_last(model, p.state, u, reach) for p, u in zip(problems, prompts, strict=True)
        ]
        known = [view for view in views if view is not None]
        if len(known) < len(views):
            return {}
        log_d, alpha, own, whole = (
            torch.stack([getattr(view, name) for view in known])
            for name in ("log_d", "alpha", "own", "whole")
        )
        value = reach.value.expand_as(log_d)
        lengths = k.clamp(min=0)[:, None].expand(log_d.shape)
        wanted = torch.stack([_target_value(model, problem) for problem in problems])
        return {
            "head_orthogonal": orthogonal_part(whole, own).norm(dim=-1),
            "head_limit": limit(lengths, log_d, alpha, value),
            "head_min_k": minimal_k(orthogonal_part(wanted, own).norm(dim=-1), log_d, alpha, value),
        }

    return context.piece("heads", measure)


def _has_further_keys(model: ModelAdapter) -> bool:
    """Learned keys, values or tokens of toys are no part of what is bounded."""
    config = getattr(getattr(model, "model", None), "config", None)
    return model.backend == "toy" and (
        getattr(config, "bias", "none") != "none" or model.attention != "softmax"
    )


def _target_value(model: ModelAdapter, problem: Problem) -> Float[Tensor, "head d_head"]:
    """What each head of layer 0 writes when it reads the target alone, first of the control."""
    n_bos = len(problem.state.bos)
    row = torch.cat([problem.state.bos, torch.tensor([problem.target])])[None]
    site = Site("v", 0)
    value: Tensor = model.capture(row, [site], lambda x: x[0, n_bos].float().cpu())[site]
    return value.repeat_interleave(model.spec.n_heads // value.shape[0], dim=0)


# A whole model of one layer of attention


def excluded_pairs(
    model: ModelAdapter, problems: Sequence[Problem], k_max: int, context: Context
) -> Bool[Tensor, " pair"]:
    """Pairs that no control of at most ``k_max`` tokens can reach, proved.

    Only a model of one layer of softmax attention without MLP is bounded as a whole; of any other
    nothing is proved and nothing excluded.
    """
    none = torch.zeros(len(problems), dtype=torch.bool)
    spec = model.spec
    single = spec.n_layers == 1 and spec.n_heads and not spec.d_mlp
    readout = _readout(model) if single and model.capabilities >= NEEDS else None
    if readout is None or _has_further_keys(model):
        return none

    def measure() -> dict[str, Tensor]:
        n_bos = max(len(problem.state.bos) for problem in problems)
        reach = vocabulary_reach(model, range(n_bos + k_max))
        found = none.clone()
        for state in {problem.state.index: problem.state for problem in problems}.values():
            wins = _can_win(model, state, k_max, (reach, readout))
            for problem in problems:
                if problem.state.index == state.index:
                    found[problem.index] = not bool(wins[problem.target])
        return {"excluded": found}

    return context.piece("excluded", measure)["excluded"]


def _readout(model: ModelAdapter) -> Float[Tensor, "d_model d_vocab"] | None:
    """Final norm and unembedding as one matrix, whose argmax is the model's.

    A norm scales (which no argmax sees), centres and weights. With a bias in it that is not so.
    """
    final_norm = getattr(model, "final_norm", None)
    if final_norm is None:
        return None
    d_model = model.spec.d_model
    if float(final_norm(torch.zeros(1, d_model)).abs().max()) > 1e-6:
        return None
    basis = 1e3 * torch.eye(d_model)
    through = final_norm(basis)
    # By symmetry every basis vector is scaled alike.
    x = torch.randn(8, d_model, generator=torch.Generator().manual_seed(0))
    linear, real = x @ through, final_norm(1e3 * x)
    cosine = torch.nn.functional.cosine_similarity(linear, real)
    if bool((cosine < 1 - 1e-5).any()):
        return None
    return through @ model.weight("W_U")


def _can_win(
    model: ModelAdapter, state: State, k_max: int, how: tuple[Reach, Tensor]
) -> Bool[Tensor, " d_vocab"]:
    """Tokens that may be the argmax for some control of at most ``k_max`` tokens."""
    reach, readout = how
    w_o = model.weight("W_O", 0)
    wins = torch.zeros(model.spec.d_vocab, dtype=torch.bool)
    for k in range(k_max + 1):
        stand_in = state.tokens[:1].expand(k)
        view = view_last(model, state, stand_in, reach)
        if view is None:
            return torch.ones_like(wins)
        before, added, after = _stream(model, state.rows(stand_in[None]))
        # A norm behind the sum makes what heads write no part of what is read.
        if bool((before + added - after).abs().max() > 1e-3 * after.abs().max()):
            return torch.ones_like(wins)
        fixed = after - torch.einsum("hd,hdm->m", view.whole, w_o)
        own = torch.einsum("hd,hdm->hm", view.own, w_o) @ readout
        limits = limit(k, view.log_d, view.alpha, reach.value)
        wins |= _may_win(fixed @ readout, own, limits, w_o @ readout)
    return wins


def _stream(model: ModelAdapter, row: Int[Tensor, "1 pos"]) -> Iterator[Float[Tensor, " d_model"]]:
    """The last position before attention, what attention adds, and the position after it."""
    sites = [Site(name, 0) for name in ("resid_pre", "attn_out", "resid_post")]
    found = model.capture(row, sites, lambda x: x[0, -1].float().cpu())
    return (found[site] for site in sites)


def _may_win(
    fixed: Float[Tensor, " d_vocab"],
    own: Float[Tensor, "head d_vocab"],
    limits: Float[Tensor, " head"],
    written: Float[Tensor, "head d_head d_vocab"],
) -> Bool[Tensor, " d_vocab"]:
    """For each token whether it may beat every other, at the best for each rival.

    Args:
        fixed: Logits of what attention does not write.
        own: Logits of each head's own output.
        limits: How long what the control adds to a head can be.
        written: Logits of a head's unit vectors.
    """
    wins = torch.ones(len(fixed), dtype=torch.bool)
    for token in range(len(fixed)):
        gap = fixed[token] - fixed
        heads = (own[:, token, None] - own).clamp(min=0).sum(dim=0)
        lengths = (written[..., token, None] - written).norm(dim=1)
        most = gap + heads + (limits[:, None] * lengths).sum(dim=0)
        slack = 1e-4 * (gap.abs() + heads + lengths.sum(dim=0) * limits.max()) + 1e-6
        wins[token] = bool((most + slack >= 0).all())
    return wins
