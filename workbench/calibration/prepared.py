"""Questions made ready for an intervention on one head at a time, and kept while memory lasts.

On the hf backend a head's pass begins where the head changes something (``later_rows``). Other backends,
and models that are edited already, run whole passes (``one_head``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.attention.streaming import PatternStatistic
from workbench.calibration.effects import Answers, Work, stock_answers
from workbench.calibration.later_rows import LaterRows, survey
from workbench.calibration.one_head import WholeRows
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.memory import free_memory_bytes
from workbench.models.base import ModelAdapter, ModelSpec, Site
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.memory import fitting_batch_size

KEPT_BYTES = 1 << 30
"""Memory for what heads' passes go on from, of questions that were run once; a quarter of what is free
at most."""


def bytes_of_question(spec: ModelSpec, n_pos: int, dtype: str) -> int:
    """What ``LaterRows`` keeps of a question of so many tokens, all layers."""
    of_heads = spec.d_head * 2 * (spec.n_heads + spec.n_kv_heads)
    size = 4 if dtype == "float32" else 2
    return size * n_pos * spec.n_layers * (spec.d_model + of_heads)


def largest_batch(model: ModelAdapter, questions: Sequence[Encoded]) -> int:
    """As many questions at once as fit into a share of the free memory with what is kept of them."""
    longest = max((len(item.prompt) for item in questions), default=1)
    kept = bytes_of_question(model.spec, longest, model.dtype) if begins_inside(model) else 0
    return fitting_batch_size(model, longest, kept)


def room() -> int:
    """Bytes that may be kept."""
    return min(KEPT_BYTES, free_memory_bytes() // 4)


@runtime_checkable
class Rows(Protocol):
    """Some questions, ready for passes under one head each."""

    def answers(
        self, layer: int, rows: Sequence[tuple[int, int]], batch_size: int, work: Work
    ) -> Answers:
        """The answers of (question, head) rows, each under the intervention on its head of a layer."""
        ...


@dataclass(frozen=True)
class Prepared:
    """Some questions, what the stock model answers, and which heads would change that."""

    rows: Rows
    stock: Answers
    touched: Bool[Tensor, "layer question head"]


def prepare(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    intervention: Any,
    layers: Sequence[int],
    work: Work,
    touches: PatternStatistic | None = None,
) -> Prepared:
    """Run some questions once.

    Args:
        model: The stock model.
        questions: As many as are run together.
        intervention: What single heads are to be put under.
        layers: Whose heads take part.
        work: Is counted up.
        touches: A statistic ``[batch head]`` that is above 0 where the intervention changes a pattern,
            for backends that cannot tell it otherwise; None: it always does.
    """
    if begins_inside(model):
        assert isinstance(model, HuggingFaceModel)
        rows, stock = survey(model, questions, intervention, layers, work)
        return Prepared(rows, stock, rows.touched())
    stock = stock_answers(model, questions, len(questions), work)
    spec = model.spec
    touched = torch.ones(spec.n_layers, len(questions), spec.n_heads, dtype=torch.bool)
    if touches is not None:
        tokens, mask = pad_left([item.prompt for item in questions])
        sites = [Site("pattern", layer) for layer in layers]
        found = model.capture(tokens, sites, touches, attention_mask=mask)
        for site in sites:
            touched[site.layer] = found[site] > 0
        work.layer_forwards += len(questions) * spec.n_layers
    return Prepared(WholeRows(model, questions, intervention), stock, touched)


def begins_inside(model: ModelAdapter) -> bool:
    """Whether a pass of this model can begin behind a block's attention."""
    hooked = isinstance(model, HuggingFaceModel) and model.family.attn is not None
    return hooked and not model.interventions


@dataclass
class Kept:
    """Prepared questions by their number: kept while memory lasts, else made anew."""

    model: ModelAdapter
    questions: Sequence[Encoded]
    intervention: Any
    layers: Sequence[int]
    room: int = field(default_factory=room)

    def __post_init__(self) -> None:
        """Keep nothing yet."""
        self._kept: dict[int, dict[tuple[str, int], Tensor]] = {}

    def keep(self, numbers: Sequence[int], prepared: Prepared) -> None:
        """Keep what was made for some questions, if there is room."""
        if not isinstance(prepared.rows, LaterRows):
            return
        for place, number in enumerate(numbers):
            length = len(self.questions[number].prompt)
            parts = {key: part[place, -length:] for key, part in prepared.rows.parts.items()}
            size = sum(part.nbytes for part in parts.values())
            if size <= self.room:
                self.room -= size
                self._kept[number] = {key: part.clone() for key, part in parts.items()}

    def rows(self, numbers: Sequence[int], work: Work) -> Rows:
        """Some questions together; ``work`` counts what is made anew."""
        questions = [self.questions[number] for number in numbers]
        if not begins_inside(self.model):
            return WholeRows(self.model, questions, self.intervention)
        assert isinstance(self.model, HuggingFaceModel)
        if any(number not in self._kept for number in numbers):
            return survey(self.model, questions, self.intervention, self.layers, work)[0]
        tokens, mask = pad_left([item.prompt for item in questions])
        each = [self._kept[number] for number in numbers]
        n_pos = tokens.shape[1]
        parts = {key: torch.stack([_padded(part[key], n_pos) for part in each]) for key in each[0]}
        whole = torch.ones_like(tokens) if mask is None else mask
        return LaterRows(self.model, questions, whole, parts)


def _padded(part: Tensor, n_pos: int) -> Tensor:
    """Zeros in front, up to ``n_pos`` positions."""
    return torch.cat([part.new_zeros(n_pos - len(part), *part.shape[1:]), part])
