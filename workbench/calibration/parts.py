"""The parts of a calibration's questions: to choose heads, to choose settings, and to test the choice.

They are parted here and nowhere else, so that no question which chose something is in the table. The
result names the questions that chose (``chosen_on``); ``workbench evaluate`` says when it meets them again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.errors import DataError
from workbench.evaluation.scoring import Encoded, Settings, encode_questions
from workbench.evaluation.seen import prompt_hash
from workbench.evaluation.task import Question
from workbench.models.base import ModelAdapter

MIN_ROWS = 8


@dataclass(frozen=True)
class Splits:
    """Questions for choosing heads, for choosing settings, and for the table; no prompt in two.

    Where there are no settings to choose, ``validation`` is empty.
    """

    profile: list[Question]
    validation: list[Question]
    test: list[Question]
    n_repeated: int = 0
    """Questions that were left out, because their prompt had come before."""

    def about(self) -> dict[str, Any]:
        """Sizes, and the questions that chose, for the result's file."""
        sizes = {name: len(getattr(self, name)) for name in ("profile", "validation", "test")}
        chosen_on = sorted(prompt_hash(item) for item in [*self.profile, *self.validation])
        return {"parts": sizes, "n_repeated": self.n_repeated, "chosen_on": chosen_on}


@dataclass(frozen=True)
class EncodedParts:
    """The same parts in tokens."""

    profile: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]

    def every(self) -> list[Encoded]:
        """All of them."""
        return [*self.profile, *self.validation, *self.test]


def split(
    questions: Sequence[Question], seed: int, shares: tuple[float, float] = (0.5, 0.25)
) -> Splits:
    """Part the questions at random; the same prompt is never in two parts.

    Args:
        questions: In their order; of those with one prompt the first counts.
        seed: Of the order.
        shares: Of the different questions for ``profile`` and ``validation``; the rest is ``test``.

    Raises:
        DataError: Too few different questions.
    """
    different = list({question.prompt: question for question in reversed(questions)}.values())[::-1]
    if len(different) < MIN_ROWS:
        raise DataError(
            f"a calibration needs at least {MIN_ROWS} different questions to keep choosing and testing "
            f"apart; got {len(different)}; give more rows"
        )
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    first = round(len(order) * shares[0])
    second = first + round(len(order) * shares[1])
    profile, validation, test = (
        [different[index] for index in part]
        for part in (order[:first], order[first:second], order[second:])
    )
    return Splits(profile, validation, test, n_repeated=len(questions) - len(different))


def encode_parts(model: ModelAdapter, splits: Splits, *, validates: bool = True) -> EncodedParts:
    """Tokenise every part, before any of them is run.

    Args:
        model: With the tokenizer.
        splits: The parts.
        validates: Whether settings are chosen, which takes a part of its own.

    Raises:
        DataError: A part is empty, or a row cannot be scored; its place is told.
    """
    parts = {name: getattr(splits, name) for name in ("profile", "validation", "test")}
    empty = [
        name for name, part in parts.items() if not part and (validates or name != "validation")
    ]
    if empty:
        raise DataError(
            f"every part of a calibration must have questions; {empty[0]} is empty; give more rows"
        )
    settings = Settings()
    return EncodedParts(
        **{name: encode_questions(model, part, settings) for name, part in parts.items()}
    )


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of prompts, labels and answers."""
    content = [[item.prompt, list(item.labels), item.answer] for item in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
