"""What a proof of ``validate`` is given, what it returns, and how far apart two tensors are.

Differences are the largest absolute ones, divided by the largest entry of the reference vector
where that exceeds 1 (a residual stream with massive activations is exact to its own size only).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.models.base import ModelAdapter, Site

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Bounds by dtype. Half precision keeps 11 and 8 bits, and a different order of additions moves
the last few of them in every layer."""


@dataclass(frozen=True)
class Measured:
    """What a proof found."""

    value: float
    bound: float
    detail: str
    above: bool = False
    """The value must lie above the bound, not below it."""

    @property
    def passed(self) -> bool:
        """Whether the value is on the right side; NaN never is."""
        return self.value > self.bound if self.above else self.value <= self.bound


@dataclass
class Subject:
    """A model with the prompts it is tried on."""

    model: ModelAdapter
    tokens: Tensor
    """``[batch pos]``: random ids."""
    others: Sequence[ModelAdapter] = field(default_factory=tuple)

    @property
    def bound(self) -> float:
        """The bound for differences at this model's precision."""
        return TOLERANCES.get(self.model.dtype, TOLERANCES["float32"])

    @property
    def layers(self) -> list[int]:
        """First, middle and last layer."""
        n_layers = self.model.spec.n_layers
        return sorted({0, n_layers // 2, n_layers - 1})

    def capture(self, *sites: Site, **options: Any) -> Any:
        """Capture on the prompts."""
        return self.model.capture(self.tokens, list(sites), **options)


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the vector's largest entry where that exceeds 1."""
    if got.shape != wanted.shape:
        return float("inf")
    scale = wanted.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    return float(((got - wanted).abs() / scale).max())


def worst_of(values: Iterable[float]) -> float:
    """The largest; NaN where there is one (``max`` may pass over it)."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())
