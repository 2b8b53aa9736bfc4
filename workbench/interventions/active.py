"""The interventions that are active on one model, the same for every backend."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from workbench.attention.edits import Edit, Intervention, plan_all
from workbench.interventions.files import as_intervention
from workbench.models.base import ModelSpec


class ActiveEdits:
    """A stack of interventions and the lock that gives one thread at a time the model.

    Hooks are model-wide, so the thread that edits holds the lock until its edit has ended; other
    threads wait and never see it.
    """

    def __init__(
        self, spec: ModelSpec, lock: threading.RLock, refuse: Callable[[Edit], Any]
    ) -> None:
        """Start without any.

        Args:
            spec: Sizes of the model.
            lock: The model's.
            refuse: Raises for an edit that the backend cannot carry out on this model.
        """
        self._spec = spec
        self._lock = lock
        self._refuse = refuse
        self._active: tuple[Intervention, ...] = ()

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Those that are active now, in the order in which they apply."""
        return self._active

    def plan(self) -> list[Edit]:
        """Their edits; empty when nothing would change."""
        return plan_all(self._active, self._spec)

    @contextmanager
    def adding(self, items: tuple[Any, ...]) -> Iterator[None]:
        """Add interventions for a ``with`` block; whatever does not fit is refused before it.

        Args:
            items: Objects, the content of intervention files, or their paths.
        """
        added = tuple(as_intervention(item, self._spec) for item in items)
        with self._lock:
            for edit in plan_all(added, self._spec):
                self._refuse(edit)
            before = self._active
            self._active = before + added
            try:
                yield
            finally:
                self._active = before
