"""Each row of a batch under an intervention on a head of its own, in one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit, TiledCall
from workbench.attention.streaming import PatternBlock
from workbench.calibration.effects import Answers, Work
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.models.base import ModelAdapter, ModelSpec


@dataclass(frozen=True, eq=False)
class OneHeadARow:
    """An intervention on one layer, on the chosen head of each row only."""

    intervention: Any
    """A dataclass with ``heads``, of attention edits; the rows' heads take the place of its own."""
    layer: int
    head: Int[Tensor, " batch"]
    """The head that is changed in each row."""
    name: str = "one-head-a-row"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """The intervention's edit of the layer, mixed with what was there before."""
        heads = tuple((self.layer, head) for head in range(spec.n_heads))
        edits = replace(self.intervention, heads=heads).plan(spec)
        chosen = torch.nn.functional.one_hot(self.head, spec.n_heads).bool()
        return [_where(chosen, edit) for edit in edits if isinstance(edit, AttentionEdit)]


@dataclass(frozen=True)
class WholeRows:
    """Some questions whose rows are whole passes, as every backend runs them."""

    model: ModelAdapter
    questions: Sequence[Encoded]
    intervention: Any

    def answers(
        self, layer: int, rows: Sequence[tuple[int, int]], batch_size: int, work: Work
    ) -> Answers:
        """The answers of (question, head) rows, each under the intervention on its head of a layer."""
        found = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            asked = [self.questions[question] for question, _ in part]
            tokens, mask = pad_left([item.prompt for item in asked])
            heads = torch.tensor([head for _, head in part])
            with self.model.edit(OneHeadARow(self.intervention, layer, heads)):
                found.append(Answers.of(self.model.logits(tokens, mask, last=1)[:, 0], asked))
            work.layer_forwards += len(part) * self.model.spec.n_layers
        return Answers.joined(found)


def _where(chosen: Bool[Tensor, "batch head"], edit: AttentionEdit) -> AttentionEdit:
    """An edit that reaches the chosen heads of each row alone, in every form that it has."""

    def after(change: Callable[[AttentionCall, Tensor], Any]) -> Callable[..., Any]:
        def output(call: AttentionCall, z: Tensor) -> Any:
            changed = change(call, z)
            if changed is None:  # not accurate on this call: tiles are changed instead
                return None
            return torch.where(chosen.to(z.device)[:, None, :, None], changed, z)

        return output

    def whole(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            here = chosen.to(pattern.device)[..., None, None]
            return torch.where(here, change(pattern, first_key), pattern)

        return pattern

    def tiled(begin: Callable[..., Callable[[PatternBlock], Tensor]]) -> Callable[..., Any]:
        def begin_chosen(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            change = begin(call)

            def tile(block: PatternBlock) -> Tensor:
                here = chosen[block.batches].to(block.pattern.device)[..., None, None]
                return torch.where(here, change(block), block.pattern)

            return tile

        return begin_chosen

    return replace(
        edit,  # how accurate its output form is, and how it follows beams, stay as they are
        output=edit.output and after(edit.output),
        checked=edit.checked and after(edit.checked),
        pattern=edit.pattern and whole(edit.pattern),
        begin=edit.begin and tiled(edit.begin),
        first_key_bias=None,  # one bias a head serves no row by itself
        first_key_change=None,
        row=None,
    )
