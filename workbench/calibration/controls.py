"""The table that every calibration comes with: on questions that chose nothing."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from workbench.calibration.settings import Run
from workbench.evaluation.measures import Scored
from workbench.evaluation.scoring import Encoded, Settings, score
from workbench.models.base import ModelAdapter, ModelSpec

Heads = tuple[tuple[int, int], ...]


def control_table(
    model: ModelAdapter,
    encoded: Sequence[Encoded],
    intervention: Any,
    heads: Heads,
    layers: Sequence[int],
    run: Run,
) -> dict[str, dict[str, float]]:
    """Metrics of the uncalibrated model, of the choice, and of as many heads drawn at random.

    The random heads come from the layers that the choice was made in, so that nothing but the choice
    differs.
    """
    settings = Settings(batch_size=run.batch_size)

    def measured(edit: Any) -> dict[str, float]:
        with nullcontext() if edit is None else model.edit(edit):
            found: Scored = score(model, encoded, settings)
        return found.metrics()

    random = random_heads(model.spec, layers, len(heads), run.seed)
    return {
        "uncalibrated": measured(None),
        "calibrated": measured(replace(intervention, heads=heads)),
        "random_heads": measured(replace(intervention, heads=random)),
    }


def random_heads(spec: ModelSpec, layers: Sequence[int], n: int, seed: int) -> Heads:
    """``n`` different heads of some layers."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(layers) * spec.n_heads, generator=generator)[:n].tolist()
    places = (divmod(index, spec.n_heads) for index in picked)
    return tuple(sorted((layers[at], head) for at, head in places))
