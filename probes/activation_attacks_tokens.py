"""The attack with tokens: some context tokens are replaced so that a target follows.

One position: every token of the vocabulary is tried. More: greedy coordinate search, position by
position, each time the token with the lowest loss, until a whole sweep gains nothing. A shortlist
replaces "every token" by those that the gradient with respect to the token's embedding likes best.
What counts is the best share of forced tokens that any tried context had.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_bench import Bench
from probes.activation_attacks_optimise import score
from workbench.memory import is_out_of_memory
from workbench.models.base import Site
from workbench.models.memory import forward_bytes

MAX_SWEEPS = 20


@dataclass(frozen=True)
class Substituted:
    """The best context that was tried."""

    tokens: Int[Tensor, " pos"]
    n_correct: int
    loss: float
    """Of the context that the search ended with, nats a token."""
    n_tried: int


def substitute(
    bench: Bench, row: int, positions: tuple[int, ...], n_target: int, shortlist: int | None
) -> Substituted:
    """Search tokens for some positions so that one row's target of ``n_target`` tokens follows."""
    target = bench.cases.targets[row, :n_target]
    tokens = bench.cases.contexts[row].clone()
    loss, correct = _try(bench, tokens[None], target)
    current, best, n_tried = float(loss), (int(correct), tokens), 1
    for _ in range(MAX_SWEEPS):
        before = current
        for pos in positions:
            if best[0] == n_target:
                break
            candidates = _candidates(bench, tokens, pos, target, shortlist)
            tried = tokens.repeat(len(candidates), 1)
            tried[:, pos] = candidates
            losses, correct = _try(bench, tried, target)
            n_tried += len(tried)
            if int(correct.max()) > best[0]:
                best = (int(correct.max()), tried[correct.argmax()])
            if float(losses.min()) < current:
                current, tokens = float(losses.min()), tried[losses.argmin()]
        if best[0] == n_target or current >= before or len(positions) == 1:
            break
    return Substituted(best[1], best[0], current, n_tried)


def gradient_shortlist(
    bench: Bench,
    tokens: Int[Tensor, " pos"],
    pos: int,
    target: Int[Tensor, " t"],
    count: int,
) -> Int[Tensor, " candidate"]:
    """The tokens whose embedding would lower the loss most, were the loss linear in it."""
    site = Site("resid_pre", 0)
    whole = torch.cat([tokens, target[:-1]])[None]
    resid = bench.model.capture(whole, [site])[site].requires_grad_()
    logits = bench.model.continue_from(0, resid, last=len(target))
    loss, _ = score(logits, target[None], 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), resid)
    gain = -(bench.model.weight("W_E") @ gradient[0, pos])
    return gain.topk(min(count, len(gain))).indices


def _candidates(
    bench: Bench, tokens: Tensor, pos: int, target: Tensor, shortlist: int | None
) -> Int[Tensor, " candidate"]:
    if shortlist is None:
        return torch.arange(bench.model.spec.d_vocab)
    return gradient_shortlist(bench, tokens, pos, target, shortlist)


def _try(
    bench: Bench, contexts: Int[Tensor, "candidate pos"], target: Int[Tensor, " t"]
) -> tuple[Float[Tensor, " candidate"], Int[Tensor, " candidate"]]:
    """Loss and number of forced tokens of each context, in parts that fit the memory."""
    whole = torch.cat([contexts, target[:-1].expand(len(contexts), -1)], dim=1)
    size = max(
        1, bench.budget_bytes // forward_bytes(bench.model.spec, whole.shape[1], len(target))
    )
    while True:
        try:
            parts = [_score_part(bench, part, target) for part in whole.split(size)]
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            continue
        losses, counts = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(counts)


def _score_part(
    bench: Bench, tokens: Int[Tensor, "candidate pos"], target: Int[Tensor, " t"]
) -> tuple[Float[Tensor, " candidate"], Int[Tensor, " candidate"]]:
    logits = bench.model.logits(tokens, last=len(target))
    loss, correct = score(logits, target.expand(len(tokens), -1), bench.margin)
    return loss, correct.sum(dim=1)
