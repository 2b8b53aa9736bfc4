"""What a measurement is told beside model, tokens and config."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor


def _silent(done: int, total: int) -> None:
    """Report nothing."""


def _quiet(text: str) -> None:
    """Show nothing."""


def _compute(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute a part and keep nothing."""
    return compute()


class _NotKeptError(Exception):
    """Nothing is kept under a name."""


@runtime_checkable
class Drafts(Protocol):
    """Where work that has not ended is noted, each note in the place of the last."""

    def read_draft(self, name: str) -> dict[str, Tensor] | None:
        """The last note under a name; None: there is none."""
        ...

    def write_draft(self, name: str, part: dict[str, Tensor]) -> None:
        """Note where the work stands."""
        ...


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
    status: Callable[[str], None] = field(default=_quiet)
    """Told where a long search stands, in one line that replaces the last."""
    keep: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = field(
        default=_compute
    )
    """What ``piece`` does; with a store, ``workbench.store.pieces.Pieces.get_or_compute``."""
    drafts: Drafts | None = None
    """Where ``note`` writes; None: without a store, nowhere."""

    def piece(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """One part of a long measurement; a killed run that goes on finds it done.

        Args:
            name: Names the part within the measurement, e.g. ``batch-0``. Parts made from a batch
                may say its start: another batch size never mixes with this one.
            compute: Makes the part: small tensors by name, on any device.
        """
        return self.keep(name, compute)

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """A part that is kept already; None: it is still to be made.

        For searches of many problems at once: each is kept by itself (``piece``) when it ends.
        """

        def absent() -> dict[str, Tensor]:
            raise _NotKeptError

        try:
            return self.piece(name, absent)
        except _NotKeptError:
            return None

    def noted(self, name: str) -> dict[str, Tensor] | None:
        """What was noted last of a part that has not ended."""
        return None if self.drafts is None else self.drafts.read_draft(name)

    def note(self, name: str, part: dict[str, Tensor]) -> None:
        """Note where a part stands that takes long, so that a killed run need not begin it anew."""
        if self.drafts is not None:
            self.drafts.write_draft(name, part)

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

    def each_batch(
        self,
        tokens: Int[Tensor, "batch pos"],
        measure: Callable[[Batch], dict[str, Tensor]],
    ) -> list[dict[str, Tensor]]:
        """Measure batch by batch, each a ``piece`` of its own.

        Args:
            tokens: All prompts.
            measure: From a batch to small tensors by name.
        """

        def part(batch: Batch) -> dict[str, Tensor]:
            return self.piece(f"batch-{batch.start}", lambda: measure(batch))

        return [part(batch) for batch in self.batches(tokens)]
