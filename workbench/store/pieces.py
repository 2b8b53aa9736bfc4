"""Finished parts of a long measurement, kept until its result is published.

    <store>/pieces/<key>/<hash of the part's name>.<hash of its content>.safetensors
    <store>/pieces/<key>/<hash of the part's name>.draft       of a part that is under way, the last only

A killed run that is started again finds the parts it had finished. A part that does not hold what
its name says is computed again.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workbench.store.files import explained, fault, replace_file
from workbench.store.record import is_key

SHORT_HASH = 32


class Pieces:
    """The parts of one measurement in one store."""

    def __init__(self, folder: Path, key: str, layout: str = "") -> None:
        """Choose the folder; nothing is written.

        Args:
            folder: The store.
            key: Of the result that is being measured; all 64 characters.
            layout: How the work is cut into parts; parts of another cut are not taken.
        """
        assert is_key(key)  # nothing else becomes a path
        self._folder = folder / "pieces" / key
        self._layout = layout

    def get_or_compute(
        self, name: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The part that was kept under a name, else a new one, which is kept.

        Raises:
            StoreError: The folder cannot be written.
        """
        kept = self._read(name)
        if kept is not None:
            return kept
        part = _own(compute())
        content = save(part)
        path = self._folder / f"{self._stem(name)}.{_short(content)}.safetensors"
        with explained("write", self._folder):
            replace_file(path, content)
        fault("after-piece")
        return part

    def read_draft(self, name: str) -> dict[str, Tensor] | None:
        """What was written last about a part under way; None: nothing, or it is damaged."""
        path = self._folder / f"{self._stem(name)}.draft"
        with explained("read", self._folder):
            found = path.read_bytes() if path.is_file() else b""
        digest, content = found[:SHORT_HASH], found[SHORT_HASH:]
        return _parse(content) if digest == _short(content).encode() else None

    def write_draft(self, name: str, part: dict[str, Tensor]) -> None:
        """Note where a part stands, in the place of what was noted before.

        Raises:
            StoreError: The folder cannot be written.
        """
        content = save(_own(part))
        with explained("write", self._folder):
            path = self._folder / f"{self._stem(name)}.draft"
            replace_file(path, _short(content).encode() + content)
        fault("after-draft")

    def discard(self) -> None:
        """Forget every part: the result is published, or is to be measured afresh."""
        fault("before-discard")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Tensor] | None:
        with explained("read", self._folder):
            for path in sorted(self._folder.glob(f"{self._stem(name)}.*.safetensors")):
                content = path.read_bytes()
                if path.name.split(".")[1] == _short(content):
                    return _parse(content)
        return None

    def _stem(self, name: str) -> str:
        return _short(f"{self._layout}\n{name}".encode())


def _own(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with memory of its own: safetensors refuses tensors that share it."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in part.items()
    }


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:SHORT_HASH]


def _parse(content: bytes) -> dict[str, Tensor] | None:
    try:
        parsed: dict[str, Tensor] = load(content)
    except SafetensorError:
        return None
    # ``load`` gives views into the bytes; a part must be as free as a computed one.
    return {name: torch.clone(tensor) for name, tensor in parsed.items()}
