"""What an intervention on one head alone does to every answer, without whole forward passes.

The residual stream in front of each block is captured once for a batch of questions; for a head of
block l the pass goes on from there, many (question, head) rows at once. A forward pass of a row from
block l on counts as n_layers - l layer-forwards; the search that tries one head at a time on whole
passes spends n_layers on each. Card: act section 3, zerotuning section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.calibration.one_head import OneHeadARow
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.models.base import ModelAdapter, Site


@dataclass
class Work:
    """Counts what was spent."""

    layer_forwards: int = 0
    """Blocks run, one for each question or row."""


@dataclass(frozen=True)
class Prepared:
    """Some questions with the residual stream in front of every block."""

    questions: Sequence[Encoded]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    """``resid_pre`` of every layer."""
    touched: Bool[Tensor, "layer batch head"] | None = None
    """Where the intervention would change anything at all; None: it is not known."""


@dataclass(frozen=True)
class Answers:
    """What rows say where their answers begin."""

    margin: Float[Tensor, "*rows"]
    """Score of the right label over the best other one, in nats; right answers are above 0."""
    entropy: Float[Tensor, "*rows"]
    """Of the next token, in nats."""

    @staticmethod
    def of(logits: Float[Tensor, "rows d_vocab"], questions: Sequence[Encoded]) -> "Answers":
        """Read the labels' first tokens."""
        log_probs = logits.log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        margins = [_margin(row, item) for row, item in zip(log_probs, questions, strict=True)]
        return Answers(torch.stack(margins), entropy)


def _margin(log_probs: Tensor, question: Encoded) -> Tensor:
    scores = log_probs[[label[0] for label in question.labels]]
    others = torch.cat([scores[: question.answer], scores[question.answer + 1 :]])
    return scores[question.answer] - others.max()


def stock_answers(
    model: ModelAdapter, questions: Sequence[Encoded], batch_size: int, work: Work
) -> Answers:
    """The answers of the model as it is."""
    parts = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        tokens, mask = pad_left([item.prompt for item in batch])
        parts.append(Answers.of(model.logits(tokens, mask, last=1)[:, 0], batch))
        work.layer_forwards += len(batch) * model.spec.n_layers
    return Answers(
        torch.cat([part.margin for part in parts]), torch.cat([part.entropy for part in parts])
    )


def prepare(
    model: ModelAdapter, questions: Sequence[Encoded], touches: Any, work: Work
) -> Prepared:
    """Run some questions once and keep what every head's pass goes on from.

    Args:
        model: The stock model.
        questions: As many as fit in memory with all their residual streams.
        touches: A pattern statistic ``[batch head]`` that is above 0 where the intervention would
            change a pattern; None: it always would.
        work: Is counted up.
    """
    tokens, mask = pad_left([item.prompt for item in questions])
    layers = range(model.spec.n_layers)
    sites = [Site("resid_pre", layer) for layer in layers]
    if touches is not None:
        sites += [Site("pattern", layer) for layer in layers]
    reduce = None if touches is None else {"pattern": touches}
    found = model.capture(tokens, sites, reduce, attention_mask=mask)
    work.layer_forwards += len(questions) * model.spec.n_layers
    touched = None
    if touches is not None:
        touched = torch.stack([found[Site("pattern", layer)] for layer in layers]) > 0
    resid = tuple(found[Site("resid_pre", layer)] for layer in layers)
    return Prepared(questions, tokens, mask, resid, touched)


KEPT_BYTES = 1 << 30
"""Memory for the residual streams of questions that were run once."""


class Residuals:
    """``resid_pre`` of every block, by question: kept while memory lasts, else made anew."""

    def __init__(
        self, model: ModelAdapter, questions: Sequence[Encoded], limit: int = KEPT_BYTES
    ) -> None:
        """Keep nothing yet.

        Args:
            model: The stock model.
            questions: All of them.
            limit: Bytes that may be kept.
        """
        self._model, self._questions, self._room = model, questions, limit
        self._kept: dict[int, list[Tensor]] = {}

    def keep(self, rows: Sequence[int], prepared: Prepared) -> None:
        """Keep what was made for some questions, if there is room."""
        for place, row in enumerate(rows):
            length = len(self._questions[row].prompt)
            parts = [layer[place, -length:].clone() for layer in prepared.resid]
            size = sum(part.nbytes for part in parts)
            if size <= self._room:
                self._room -= size
                self._kept[row] = parts

    def prepared(self, rows: Sequence[int], work: Work) -> Prepared:
        """The residual streams of some questions together; ``work`` counts those made anew."""
        questions = [self._questions[row] for row in rows]
        if any(row not in self._kept for row in rows):
            return prepare(self._model, questions, None, work)
        tokens, mask = pad_left([item.prompt for item in questions])
        resid = []
        for layer in range(self._model.spec.n_layers):
            parts = [self._kept[row][layer] for row in rows]
            missing = [tokens.shape[1] - len(part) for part in parts]
            pad = torch.nn.functional.pad
            padded = [pad(x, (0, 0, n, 0)) for x, n in zip(parts, missing, strict=True)]
            resid.append(torch.stack(padded))
        return Prepared(questions, tokens, mask, tuple(resid))


def answers_of_rows(
    model: ModelAdapter,
    prepared: Prepared,
    intervention: Any,
    layer: int,
    rows: Sequence[tuple[int, int]],
    work: Work,
) -> Answers:
    """The answers of (question, head) rows, each under the intervention on its head of a layer."""
    index = torch.tensor([question for question, _ in rows])
    heads = torch.tensor([head for _, head in rows])
    mask = None if prepared.mask is None else prepared.mask[index]
    with model.edit(OneHeadARow(intervention, layer, heads)):
        logits = model.continue_from(layer, prepared.resid[layer][index], mask, last=1)[:, 0]
    work.layer_forwards += len(rows) * (model.spec.n_layers - layer)
    return Answers.of(logits.cpu(), [prepared.questions[question] for question, _ in rows])
