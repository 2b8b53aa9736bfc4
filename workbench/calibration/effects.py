"""What the model says to questions, and what was spent to hear it.

Work is counted in layer-forwards: one question through one block. A part of a block counts as its share
of the block's positions and of the entries of its matrices, so that 1 is always the price that a whole
pass pays for a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.evaluation.scoring import Encoded, pad_left
from workbench.models.base import ModelAdapter


@dataclass
class Work:
    """Counts what was spent."""

    layer_forwards: float = 0.0
    """Blocks run, one for each question or row."""


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

    @staticmethod
    def joined(parts: "Sequence[Answers]") -> "Answers":
        """Batches one behind the other."""
        return Answers(
            torch.cat([part.margin for part in parts]), torch.cat([part.entropy for part in parts])
        )


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
    return Answers.joined(parts)
