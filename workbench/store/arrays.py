"""The arrays of a stored result, left on disk until they are asked for."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from workbench.errors import DamagedResultError
from workbench.store.files import explained
from workbench.store.record import ARRAYS, Record, missing_file


class StoredArrays(Mapping[str, Any]):
    """The arrays of a stored result, each read when asked for, after the file's checksum held.

    The values are numpy arrays; typed so, a run-time check of types would read one of them.
    """

    def __init__(
        self,
        record: Record,
        on_damage: Callable[[DamagedResultError], DamagedResultError] = lambda error: error,
    ) -> None:
        """Point at a result.

        Args:
            record: Whose arrays.
            on_damage: Given the error when the file turns out damaged; returns what to raise.
        """
        self._record = record
        self._on_damage = on_damage
        self._checked = False
        self._arrays: dict[str, np.ndarray] = {}
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] | None = None
        self._lock = threading.Lock()

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every array, from the file's header."""
        if self._shapes is None:
            with self._opened() as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self._shapes = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in sorted(slices.items())
                }
        return dict(self._shapes)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one array.

        Raises:
            DamagedResultError: The file is not the one that was written.
        """
        if name not in self.describe():
            raise KeyError(name)
        with self._lock:
            if name not in self._arrays:
                with self._opened(check=not self._checked) as file:
                    self._checked = True
                    self._arrays[name] = file.get_tensor(name)
            return self._arrays[name]

    @contextlib.contextmanager
    def _opened(self, check: bool = False) -> Iterator[Any]:
        record = self._record
        try:
            if check:
                record.check_file(ARRAYS)
            # safetensors reports a missing file in its own words; these are ours.
            if not (record.folder / ARRAYS).is_file():
                raise missing_file(record.folder, record.key, ARRAYS)
            with (
                explained("read", record.folder / ARRAYS),
                safetensors.safe_open(record.folder / ARRAYS, framework="numpy") as file,
            ):
                yield file
        except DamagedResultError as error:
            raise self._on_damage(error) from error
        except safetensors.SafetensorError as error:
            raise self._on_damage(
                DamagedResultError(f"{ARRAYS} of result {record.key} must be safetensors: {error}")
            ) from error

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array, without reading it."""
        return name in self.describe()

    def __iter__(self) -> Iterator[str]:
        """The names, in alphabetical order."""
        return iter(self.describe())

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self.describe())
