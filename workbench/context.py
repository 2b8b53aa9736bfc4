"""What a measurement is told beside model, tokens and config."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def _silent(done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Batch:
    """Some prompts of a run, right-padded."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None
    """1 where a token is, 0 where padding is; None: no padding."""
    start: int
    """Index of the first prompt of the batch."""


@dataclass(frozen=True)
class Context:
    """Padding, seed, batch size and progress of one run."""

    attention_mask: Int[Tensor, "batch pos"] | None = None
    """1 where a token is; padding is on the right (``workbench.prompts`` sees to it)."""
    seed: int = 0
    batch_size: int | None = None
    """Prompts a forward pass; None: all at once."""
    progress: Callable[[int, int], None] = field(default=_silent)
    """Called with (prompts done, prompts in all)."""
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """One value a prompt, e.g. ``{"domain": ("wikipedia", "wikipedia", "code")}``."""
    rows: tuple[dict[str, Any], ...] = ()
    """The whole rows of the data, one a prompt, where the data has columns."""

    def generator(self) -> torch.Generator:
        """A fresh generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)

    def batches(self, tokens: Int[Tensor, "batch pos"]) -> Iterator[Batch]:
        """Cut the prompts into batches and report progress after each."""
        total = tokens.shape[0]
        size = self.batch_size or max(total, 1)
        for start in range(0, total, size):
            mask = self.attention_mask
            yield Batch(
                tokens[start : start + size],
                None if mask is None else mask[start : start + size],
                start,
            )
            self.progress(min(start + size, total), total)
