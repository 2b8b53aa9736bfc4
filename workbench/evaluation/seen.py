"""Questions that have chosen an intervention, known again when it is evaluated.

A calibration's file names the prompts that its heads and settings were chosen on. Numbers on those say
how well the choice fits them, not what it does for others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.evaluation.task import Question

HASH_LENGTH = 16
"""Hexadecimal digits by which a file names a prompt."""


def prompt_hash(question: Question) -> str:
    """By what a file names a question: its prompt, without examples in front."""
    return hashlib.sha256((question.bare or question.prompt).encode()).hexdigest()[:HASH_LENGTH]


def seen_in_calibration(questions: Sequence[Question], intervention: Any) -> int:
    """How many questions were among those that chose an intervention.

    Args:
        questions: With or without examples in front.
        intervention: The content of a file, its path, or anything else (which was chosen on none).
    """
    if isinstance(intervention, str | Path):
        intervention = json.loads(Path(intervention).read_text("utf-8"))
    if not isinstance(intervention, Mapping):
        return 0
    calibration = intervention.get("calibration")
    chosen_on = calibration.get("chosen_on") if isinstance(calibration, Mapping) else None
    known = (
        {name for name in chosen_on if isinstance(name, str)}
        if isinstance(chosen_on, list)
        else set()
    )
    return sum(prompt_hash(question) in known for question in questions)
