"""What an intervention on one head alone does to an answer, from the first position that it changes.

One pass of the stock model over some questions keeps of every block the residual stream in front of it,
its keys and values, every head's z, and what the intervention would make of that z: of all heads at once,
because those of one block do not see each other. The pass of a (question, head) row then goes on behind
the attention of the head's block, from the first position whose z is another: what lies before it is as
it was, and later blocks read the kept keys and values there. Of the last block the answer needs the last
position, so that a head in it changes nothing unless it does so there.

A position is unchanged when its z is the same bit for bit: then nothing behind it can differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit, AttentionCall, AttentionEdit, Edit
from workbench.calibration.edited_z import attended, edited_after_kernel, edited_in_tiles
from workbench.calibration.effects import Answers, Work
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.models.base import ModelSpec, Site
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.prefix import KeysValues, Prefix

Parts = Mapping[tuple[str, int], Tensor]
"""By name and layer, ``[question pos ...]``, prompts padded on the left: ``keys`` and ``values`` of every
block; ``resid``, ``z``, ``edited`` (z of every head under the intervention) and ``changed`` (bool, by
head) of those whose heads take part."""


@dataclass(frozen=True)
class LaterRows:
    """Some questions with what every head's pass goes on from."""

    model: HuggingFaceModel
    questions: Sequence[Encoded]
    mask: Int[Tensor, "question pos"]
    parts: Parts

    def touched(self) -> Bool[Tensor, "layer question head"]:
        """Where the intervention on one head would change anything that the answer is made of."""
        spec = self.model.spec
        touched = torch.zeros(spec.n_layers, len(self.questions), spec.n_heads, dtype=torch.bool)
        for name, layer in self.parts:
            if name == "changed":
                touched[layer] = self._changed(layer).any(dim=1)
        return touched

    def answers(
        self, layer: int, rows: Sequence[tuple[int, int]], batch_size: int, work: Work
    ) -> Answers:
        """The answers of (question, head) rows, each under the intervention on its head of a layer.

        A row whose head is not touched may be among them; it costs its last position.
        """
        changed = self._changed(layer)
        # Behind every position: none is.
        first = torch.where(changed.any(dim=1), changed.int().argmax(dim=1), changed.shape[1] - 1)
        starts = [int(first[row]) for row in rows]
        margin, entropy = torch.zeros(len(rows)), torch.zeros(len(rows))
        for places in _alike(starts, batch_size):
            picked = [rows[place] for place in places]
            found = self._run(layer, picked, min(starts[place] for place in places), work)
            margin[places], entropy[places] = found.margin, found.entropy
        return Answers(margin, entropy)

    def _changed(self, layer: int) -> Bool[Tensor, "question pos head"]:
        changed = self.parts["changed", layer]
        if layer < self.model.spec.n_layers - 1:
            return changed
        return torch.cat([torch.zeros_like(changed[:, :-1]), changed[:, -1:]], dim=1)

    def _run(self, layer: int, rows: Sequence[tuple[int, int]], first: int, work: Work) -> Answers:
        question, head = torch.tensor(rows).T
        here = torch.arange(len(rows))
        resid, z, edited = (
            self.parts[name, layer][question, first:] for name in ("resid", "z", "edited")
        )
        z[here, :, head] = edited[here, :, head]
        mask = self.mask[question]
        logits = self.model.continue_from(
            layer, resid, mask[:, first:], last=1, prefix=self._prefix(layer, question, first), z=z
        )[:, 0]
        self._count(layer, mask, first, work)
        return Answers.of(logits.float().cpu(), [self.questions[at] for at, _ in rows])

    def _prefix(self, layer: int, question: Int[Tensor, " row"], first: int) -> Prefix | None:
        n_layers = self.model.spec.n_layers
        if not first or layer == n_layers - 1:
            return None

        def kept(of: int) -> KeysValues:
            keys, values = (self.parts[name, of] for name in ("keys", "values"))
            if of <= layer:  # is not run: how many positions there are is all that counts
                size = (len(question), keys.shape[2], first)
                empty = [x.new_zeros(1).expand(*size, x.shape[-1]) for x in (keys, values)]
                return empty[0], empty[1]
            return (
                keys[question, :first].transpose(1, 2),
                values[question, :first].transpose(1, 2),
            )

        mask = self.mask[question, :first]
        return self.model.kept_prefix([kept(of) for of in range(n_layers)], mask)

    def _count(self, layer: int, mask: Int[Tensor, "row pos"], first: int, work: Work) -> None:
        own, last = self.model.shares(layer), self.model.spec.n_layers - 1
        n_tokens = mask.sum(dim=1)
        one = (1.0 / n_tokens).sum()
        later = (mask[:, first:].sum(dim=1) / n_tokens).sum()
        if layer == last:
            work.layer_forwards += float(own.behind * one)
            return
        unread = self.model.shares(last).unread
        whole = own.behind + (last - 1 - layer) + (1.0 - unread)
        work.layer_forwards += float(whole * later + unread * one)


def _alike(starts: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of rows that start at like positions."""
    order = sorted(range(len(starts)), key=lambda place: starts[place])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def survey(
    model: HuggingFaceModel,
    questions: Sequence[Encoded],
    intervention: Any,
    layers: Sequence[int],
    work: Work,
) -> tuple[LaterRows, Answers]:
    """Run some questions once; the stock answers, and what heads' passes go on from.

    Args:
        model: Unedited, with attention.
        questions: As many as fit in memory.
        intervention: A dataclass with ``heads``, of attention edits; all heads take the place of its own.
        layers: Those whose heads take part.
        work: Is counted up.
    """
    tokens, mask = pad_left([item.prompt for item in questions])
    beside = _Beside(intervention, frozenset(layers), mask)
    with model.edit(beside):
        logits = model.logits(tokens, mask, last=1)[:, 0]
    work.layer_forwards += len(questions) * model.spec.n_layers
    whole = torch.ones_like(tokens) if mask is None else mask
    return LaterRows(model, questions, whole, beside.parts), Answers.of(logits, questions)


@dataclass(eq=False)
class _Beside:
    """Changes nothing, and keeps what an intervention would change."""

    intervention: Any
    layers: frozenset[int]
    mask: Tensor | None
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    name: str = "beside"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer that reads, and hands on what it is given."""
        heads = tuple(
            (layer, head) for layer in sorted(self.layers) for head in range(spec.n_heads)
        )
        planned = replace(self.intervention, heads=heads).plan(spec)
        edits = {edit.layer: edit for edit in planned if isinstance(edit, AttentionEdit)}
        found: list[Edit] = [
            AttentionEdit(layer, partial(self._read, edits.get(layer)), None)
            for layer in range(spec.n_layers)
        ]
        return found + [
            ActivationEdit(Site("resid_pre", layer), partial(self._keep_resid, layer))
            for layer in self.layers
        ]

    def _keep_resid(self, layer: int, resid: Tensor) -> Tensor:
        # A copy: the model may go on in place.
        self.parts["resid", layer] = resid.to("cpu", copy=True)
        return resid

    def _read(self, edit: AttentionEdit | None, call: AttentionCall, z: Tensor) -> Tensor:
        inputs, layer = call.inputs, call.layer
        self.parts["keys", layer] = inputs.key.transpose(1, 2).cpu()
        self.parts["values", layer] = inputs.value.transpose(1, 2).cpu()
        if layer not in self.layers:
            return z
        valid = None if self.mask is None else self.mask.float().to(z.device)
        edited = None if edit is None else edited_after_kernel(edit, call, z)
        plain = z
        if edit is not None and edited is None:  # made in tiles: so is what it is compared with
            edited, plain = edited_in_tiles(edit, call, valid), attended(inputs, valid)
        edited = z if edited is None else edited
        changed = ~((edited == z) | (edited == plain)).all(dim=-1)
        if valid is not None:
            changed &= valid.bool()[..., None]
        self.parts["z", layer], self.parts["edited", layer] = z.cpu(), edited.cpu()
        self.parts["changed", layer] = changed.cpu()
        return z
