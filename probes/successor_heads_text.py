"""What heads do on text: direct-effect mean ablation of every head, on every prefix.

For every prefix of a prompt and every head, the head's output is replaced by its mean over all the
prompts, and the change goes straight to the final norm and the unembedding: no other part of the
model sees it. The head whose ablation lowers the logit of the correct next token the most wins the
prefix. The cases that one head wins are put into categories by ``successor_heads_categories``.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230, section 4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.successor_heads_categories import categorise
from workbench.attention.edits import ActivationEdit, Edit
from workbench.context import Batch, Context
from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter, ModelSpec, Site
from workbench.models.sublayers import HasSublayers

ATTENDED = 5
MIN_PROMPTS = 2
MIN_POS = 2


# The ablation


@dataclass(frozen=True, eq=False)
class SubtractAtTheEnd:
    """Take vectors off the residual stream behind the last block, position by position."""

    vectors: Float[Tensor, "batch pos d_model"]
    name: str = "subtract-at-the-end"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit."""
        return [ActivationEdit(Site("resid_post", spec.n_layers - 1), self._subtract)]

    def _subtract(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        return x - self.vectors.to(x)


@dataclass(frozen=True)
class TextEffects:
    """Over all prefixes of all prompts."""

    direct_effect: Float[Tensor, "layer head"]
    """Mean fall of the correct token's logit when the head is ablated."""
    winning_share: Float[Tensor, "layer head"]
    """Share of prefixes that the head wins."""
    winning_categories: Float[Tensor, "judged category"] | None
    """Of the cases that the studied head wins, judged by five attended tokens, and by one; None:
    it wins none."""
    loss_increase: float
    """Mean, in nats, when the studied head is ablated."""
    n_prefixes: int
    n_winning: int

    def arrays(self) -> dict[str, Tensor | None]:
        """Under the names of the result."""
        return {
            "direct_effect": self.direct_effect,
            "winning_share": self.winning_share,
            "winning_categories": self.winning_categories,
        }

    def numbers(self, layer: int, head: int) -> dict[str, float]:
        """The headline numbers of one head."""
        return {
            "winning_share": self.winning_share[layer, head].item(),
            "loss_increase": self.loss_increase,
            "n_prefixes": float(self.n_prefixes),
            "n_winning": float(self.n_winning),
        }


def check_text(model: ModelAdapter, tokens: Int[Tensor, "batch pos"], context: Context) -> None:
    """Refuse prompts that the ablation cannot use.

    Raises:
        DataError: Too few prompts, or one too short.
        CapabilityError: The model cannot be edited, or its final norm applied.
    """
    n_prompts, n_pos = tokens.shape
    if n_prompts < MIN_PROMPTS:
        raise DataError(
            f"mean ablation needs at least {MIN_PROMPTS} prompts, whose mean replaces a head's output; "
            f"got {n_prompts}; give more, or leave --data out to read the weights only"
        )
    mask = context.attention_mask
    lengths = torch.full((n_prompts,), n_pos) if mask is None else mask.sum(dim=1)
    if int(lengths.min()) < MIN_POS:
        raise DataError(
            f"mean ablation needs at least {MIN_POS} tokens a prompt, the last to be predicted; prompt "
            f"{int(lengths.argmin())} has {int(lengths.min())}; leave it out"
        )
    missing = {"edits", "patterns"} - model.capabilities
    if missing or not isinstance(model, HasSublayers):
        raise CapabilityError(
            f"mean ablation on text needs {', '.join(sorted(missing)) or 'final_norm'}, which "
            f"{model.spec.name} on {model.backend} does not have; leave --data out"
        )


def ablate_on_text(
    model: Any, tokens: Int[Tensor, "batch pos"], studied: tuple[int, int], context: Context
) -> TextEffects:
    """Ablate every head along the direct path, and one of them with its loss.

    Args:
        model: With ``final_norm``, see ``check_text``.
        tokens: At least two prompts.
        studied: (layer, head) whose cases are put into categories.
        context: Padding, batches, and where finished parts are kept.
    """
    check_text(model, tokens, context)
    means = _mean_z(model, tokens, context)
    found = [
        context.piece(
            f"text-effects-{batch.start}", lambda b=batch: _effects(model, b, means, studied)
        )
        for batch in context.batches(tokens)
    ]
    total = {
        name: torch.cat([one[name] for one in found])
        for name in ("effect", "winner", "loss", "correct", "seen")
    }
    n_heads = model.spec.n_heads
    shape = (model.spec.n_layers, n_heads)
    n_prefixes = len(total["winner"])
    wins = torch.bincount(total["winner"][total["winner"] >= 0], minlength=shape[0] * shape[1])
    won = total["winner"] == studied[0] * n_heads + studied[1]
    return TextEffects(
        direct_effect=(total["effect"].sum(dim=0) / n_prefixes).view(shape),
        winning_share=(wins / n_prefixes).view(shape).float(),
        winning_categories=categorise(model.tokenizer, total["correct"][won], total["seen"][won]),
        loss_increase=total["loss"].sum().item() / n_prefixes,
        n_prefixes=n_prefixes,
        n_winning=int(won.sum()),
    )


def _mean_z(model: Any, tokens: Tensor, context: Context) -> Float[Tensor, "layer head d_head"]:
    """Mean of every head's z over all positions of all prompts."""
    sites = [Site("z", layer) for layer in range(model.spec.n_layers)]

    def sums(batch: Batch) -> dict[str, Tensor]:
        valid = _valid(batch)

        def add(z: Tensor) -> Tensor:
            return torch.einsum("bphd,bp->hd", z.float(), valid.to(z.device)).cpu()

        found = model.capture(batch.tokens, sites, add, attention_mask=batch.attention_mask)
        return {"sum": torch.stack([found[site] for site in sites]), "count": valid.sum()[None]}

    parts = [
        context.piece(f"text-mean-{batch.start}", lambda b=batch: sums(b))
        for batch in context.batches(tokens)
    ]
    total = torch.stack([part["sum"] for part in parts]).sum(dim=0)
    return total / torch.cat([part["count"] for part in parts]).sum()


def _valid(batch: Batch) -> Float[Tensor, "batch pos"]:
    if batch.attention_mask is None:
        return torch.ones(batch.tokens.shape)
    return batch.attention_mask.float()


def _effects(
    model: Any, batch: Batch, means: Tensor, studied: tuple[int, int]
) -> dict[str, Tensor]:
    """Of one batch: sums of the effects, and per prefix the winner, the loss and the tokens seen."""
    layers, last = range(model.spec.n_layers), Site("resid_post", model.spec.n_layers - 1)
    pattern = Site("pattern", studied[0])
    sites = [Site("z", layer) for layer in layers] + [last, pattern, Site("attn_out", 0)]
    found = model.capture(
        batch.tokens,
        sites,
        {pattern: lambda p: most_attended(p[:, studied[1]].float()).cpu()},
        attention_mask=batch.attention_mask,
    )
    heads = [model.weight("W_O", layer) for layer in layers]
    _refuse_norm_behind_heads(model, found[Site("z", 0)], heads[0], found[Site("attn_out", 0)])
    prefix = (_valid(batch)[:, 1:] * _valid(batch)[:, :-1]).bool()
    correct = batch.tokens[:, 1:][prefix]
    resid = found[last][:, :-1][prefix]
    column = model.weight("W_U").T[correct]
    logit = (model.final_norm(resid) * column).sum(dim=1)
    effects = []
    for layer, w_o in enumerate(heads):
        z = found[Site("z", layer)][:, :-1][prefix] - means[layer]
        for head in range(len(w_o)):
            changed = model.final_norm(resid - z[:, head] @ w_o[head])
            effects.append(logit - (changed * column).sum(dim=1))
    effect = torch.stack(effects, dim=1)
    seen = found[pattern][:, :-1]
    attended = batch.tokens[:, None].expand(-1, seen.shape[1], -1).gather(2, seen.clamp(min=0))
    return {
        "effect": effect.sum(dim=0)[None],
        "winner": winners(effect),
        "loss": _loss_increase(model, batch, found, means, studied)[prefix],
        "correct": correct,
        "seen": attended.masked_fill(seen < 0, -1)[prefix],
    }


def winners(effect: Float[Tensor, "prefix head"]) -> Int[Tensor, " prefix"]:
    """The head whose ablation hurts each prefix the most; -1 where none hurts."""
    most, winner = effect.max(dim=1)
    return winner.masked_fill(most <= 0, -1)


def most_attended(
    pattern: Float[Tensor, "batch q_pos k_pos"],
) -> Int[Tensor, "batch q_pos attended"]:
    """Positions of the five most attended keys, most first; -1 where a query sees fewer."""
    n_pos = pattern.shape[-1]
    weight, where = pattern.topk(min(ATTENDED, n_pos), dim=-1)
    hidden = where > torch.arange(n_pos, device=where.device)[:, None]
    where = where.masked_fill(hidden | (weight <= 0), -1)
    return torch.nn.functional.pad(where, (0, ATTENDED - where.shape[-1]), value=-1)


def _loss_increase(
    model: Any, batch: Batch, found: Any, means: Tensor, studied: tuple[int, int]
) -> Float[Tensor, "batch prefix"]:
    layer, head = studied
    z = found[Site("z", layer)][:, :, head] - means[layer, head]
    removed = SubtractAtTheEnd(z @ model.weight("W_O", layer)[head])

    def loss() -> Tensor:
        logits = model.logits(batch.tokens, batch.attention_mask)[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none"
        )

    before = loss()
    with model.edit(removed):
        return loss() - before


def _refuse_norm_behind_heads(model: Any, z: Tensor, w_o: Tensor, attn_out: Tensor) -> None:
    """What heads write must reach the stream as it is: their sum and a bias is what attention adds."""
    rest = attn_out - torch.einsum("bphd,hdm->bpm", z, w_o)
    varies = (rest - rest[:, :1]).abs().max()
    if varies > 0.02 * attn_out.abs().max():
        raise CapabilityError(
            "direct effects need heads that write straight to the residual stream; "
            f"{model.spec.name} ({model.spec.family}) normalises what they write; leave --data out"
        )
