"""The table that every calibration comes with: on questions that chose nothing."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from workbench.calibration.settings import Run
from workbench.evaluation.measures import Scored
from workbench.evaluation.scoring import Settings, encode_questions, score
from workbench.evaluation.task import Question
from workbench.models.base import ModelAdapter

Heads = tuple[tuple[int, int], ...]


def control_table(
    model: ModelAdapter,
    questions: Sequence[Question],
    intervention: Any,
    heads: Heads,
    run: Run,
) -> dict[str, dict[str, float]]:
    """Metrics of the uncalibrated model, of the choice, and of as many heads drawn at random."""
    settings = Settings(batch_size=run.batch_size)
    encoded = encode_questions(model, questions, settings)

    def measured(edit: Any) -> dict[str, float]:
        with nullcontext() if edit is None else model.edit(edit):
            found: Scored = score(model, encoded, settings)
        return found.metrics()

    random = random_heads(model, len(heads), run.seed)
    return {
        "uncalibrated": measured(None),
        "calibrated": measured(replace(intervention, heads=heads)),
        "random_heads": measured(replace(intervention, heads=random)),
    }


def random_heads(model: ModelAdapter, n: int, seed: int) -> Heads:
    """``n`` different heads of any layer."""
    spec = model.spec
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(spec.n_layers * spec.n_heads, generator=generator)[:n].tolist()
    return tuple(sorted(divmod(index, spec.n_heads) for index in picked))
