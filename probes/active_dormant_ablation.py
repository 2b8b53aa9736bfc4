"""Loss without one head, for all heads, without a whole forward pass for each.

Two ablations a head: its z (the mix of values before W_O) set to zero at every position, and its
attention moved to the first token, so that z becomes that token's value v_0 everywhere. Neither
needs a pattern. What is saved against one forward pass a head:

* blocks before the head's own are not run: they are given its residual stream;
* many heads, both ablations and several prompts share one pass: each row of the batch has its own
  head and its own z, so matrix products are large and Python is called L times instead of L x H.

What cannot be saved: every ablated head has its own blocks behind it and its own unembedding. With
all else free that is (L + 1) / 2 blocks and one unembedding instead of L blocks and one.

Paper: Guo et al. 2024, arXiv:2410.13835; their code runs one head at a time, with eager attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit
from workbench.context import Batch, Context
from workbench.models.base import ModelAdapter, ModelSpec, Site

ABLATIONS = ("zeroed", "moved to BOS")
LOGIT_BYTES = 256 << 20
"""Logits of one pass: they are the largest thing in it."""
PASS_TOKENS = 2048
"""Tokens of one pass: with more, matrix products get no faster and the rest falls out of the cache."""


@dataclass(frozen=True, eq=False)
class ReplaceHeads:
    """In every row of the batch, replace one head's z by one vector at all positions."""

    layer: int
    head: Int[Tensor, " row"]
    z: Float[Tensor, "row d_head"]
    name: str = "replace-heads"

    def plan(self, spec: ModelSpec) -> list[ActivationEdit]:
        """One edit of the layer's z."""
        return [ActivationEdit(Site("z", self.layer), self._change)]

    def _change(
        self, z: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "row pos head d_head"]:
        changed = z.clone()
        rows = torch.arange(z.shape[0], device=z.device)
        changed[rows, :, self.head.to(z.device)] = self.z.to(z)[:, None]
        return changed


# Loss


def prompt_loss(
    logits: Float[Tensor, "row pos d_vocab"],
    tokens: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"] | None,
) -> Float[Tensor, " row"]:
    """Mean over a row's targets of -log p(target), in nats.

    Only the target's log-probability is made, row by row: no second array of the logits' size.
    """
    targets = tokens[:, 1:].to(logits.device)
    loss = torch.empty(targets.shape, device=logits.device)
    for row, target in enumerate(targets):
        scores = logits[row, :-1].float()
        loss[row] = scores.logsumexp(dim=-1) - scores.gather(-1, target[:, None])[:, 0]
    if mask is None:
        return loss.mean(dim=1).cpu()
    valid = mask[:, 1:].to(loss)
    return ((loss * valid).sum(dim=1) / valid.sum(dim=1)).cpu()


def rows_at_once(
    spec: ModelSpec, n_pos: int, wanted: int | None, batch_size: int | None = None
) -> int:
    """Rows of one pass: as asked, else within ``LOGIT_BYTES``, ``PASS_TOKENS`` and the batch size.

    A run for which memory did not suffice is made again with a smaller batch: rows must follow.
    """
    fits = min(LOGIT_BYTES // (4 * spec.d_vocab), PASS_TOKENS) // n_pos
    return wanted or max(1, min(fits, batch_size or fits))


# Ablation of all heads


@dataclass(frozen=True, eq=False)
class Ablated:
    """All heads' ablations on one batch of prompts."""

    model: ModelAdapter
    batch: Batch
    n_rows: int
    """Rows of one pass."""
    continues: bool = field(init=False)
    """Whether blocks before the ablated one are left out; else they run again."""

    def __post_init__(self) -> None:
        """Ask the model once."""
        object.__setattr__(self, "continues", "continue" in self.model.capabilities)

    @cached_property
    def start(self) -> dict[Site, Tensor]:
        """Where each layer's passes start: ``resid_pre`` and the first token's values.

        They stay on the model's device, for as long as the batch lasts.
        """
        layers = range(self.model.spec.n_layers)
        names = ("resid_pre", "v") if self.continues else ("v",)
        sites = [Site(name, layer) for layer in layers for name in names]
        # In a dict: a tensor by itself would be taken to the CPU.
        reduce = {
            "resid_pre": lambda x: {"": x.clone()},
            "v": lambda v: {"": v[:, 0].clone()},
        }
        found = self.model.capture(
            self.batch.tokens, sites, reduce, attention_mask=self.batch.attention_mask
        )
        return {site: found[site][""] for site in sites}

    def intact(self) -> Float[Tensor, " prompt"]:
        """Loss of every prompt with all heads in place."""
        n = len(self.batch.tokens)
        parts = torch.arange(n).split(self.n_rows)
        return torch.cat([self._loss(self._whole(rows), rows) for rows in parts])

    def without(self, layer: int) -> Float[Tensor, "ablation prompt head"]:
        """Loss of every prompt with each head of a layer ablated in each way."""
        n, n_heads = len(self.batch.tokens), self.model.spec.n_heads
        value = self.start[Site("v", layer)]
        value = value.repeat_interleave(n_heads // value.shape[1], dim=1)
        fills = torch.stack([torch.zeros_like(value), value])
        every = torch.cartesian_prod(
            torch.arange(len(ABLATIONS)), torch.arange(n), torch.arange(n_heads)
        )
        losses = []
        for part in every.split(self.n_rows):
            prompt = part[:, 1]
            edit = ReplaceHeads(layer, part[:, 2], fills[tuple(part.T.to(fills.device))])
            with self.model.edit(edit):
                logits = self._from(layer, prompt) if self.continues else self._whole(prompt)
            losses.append(self._loss(logits, prompt))
        return torch.cat(losses).view(len(ABLATIONS), n, n_heads)

    def _mask(self, rows: Int[Tensor, " row"]) -> Int[Tensor, "row pos"] | None:
        mask = self.batch.attention_mask
        return None if mask is None else mask[rows]

    def _from(self, layer: int, rows: Int[Tensor, " row"]) -> Tensor:
        resid = self.start[Site("resid_pre", layer)]
        return self.model.continue_from(layer, resid[rows.to(resid.device)], self._mask(rows))

    def _whole(self, rows: Int[Tensor, " row"]) -> Tensor:
        return self.model.logits(self.batch.tokens[rows], self._mask(rows))

    def _loss(self, logits: Tensor, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        return prompt_loss(logits, self.batch.tokens[rows], self._mask(rows))


def ablate_all_heads(
    model: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    context: Context,
    n_rows: int,
    report: Callable[[], None] = lambda: None,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "ablation prompt layer head"]]:
    """Loss of every prompt, and what each ablation of each head adds to it, in nats per token.

    Args:
        model: Must take edits; "continue" makes it faster and changes no number.
        tokens: All prompts.
        context: Padding, batch size, and where finished (batch, layer) parts are kept.
        n_rows: Rows of one pass.
        report: Called after every layer of every batch.
    """
    losses, changes = [], []
    for batch in context.batches(tokens):
        ablated = Ablated(model, batch, n_rows)
        name = f"ablation-{batch.start}"
        intact = context.piece(name, lambda ablated=ablated: {"loss": ablated.intact()})["loss"]
        by_layer = []
        for layer in range(model.spec.n_layers):
            part = context.piece(
                f"{name}-layer-{layer}",
                lambda ablated=ablated, layer=layer: {"loss": ablated.without(layer)},
            )
            by_layer.append(part["loss"] - intact[:, None])
            report()
        losses.append(intact)
        changes.append(torch.stack(by_layer, dim=2))
    return torch.cat(losses), torch.cat(changes, dim=1)
