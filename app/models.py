"""Models for the pages: what a load would take in memory, and one loaded model for all tabs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from workbench.errors import ModelError
from workbench.models.names import resolve_model

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_HEADROOM = 1.25
"""Activations and the kernel's workspace beside the weights."""


@dataclass
class Loaded:
    """A model, and the lock that everyone holds who uses it."""

    model: Any
    lock: threading.Lock = field(default_factory=threading.Lock)


def weight_bytes(name: str, dtype: str = "auto") -> int | None:
    """Bytes that a model's weights take when loaded; None: they are not on this machine.

    Read from the headers of the safetensors files; nothing is loaded.
    """
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        return None
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(size, 1 << 26)))
            except ValueError:
                continue
        for key, tensor in header.items() if isinstance(header, dict) else ():
            if key != "__metadata__" and isinstance(tensor, dict):
                total += _tensor_bytes(tensor, dtype)
    return total


def _tensor_bytes(tensor: dict[str, Any], dtype: str) -> int:
    start, end = tensor.get("data_offsets", (0, 0))
    if dtype not in _BYTES or tensor.get("dtype") not in ("F32", "F16", "BF16"):
        return int(end) - int(start)
    numbers = 1
    for size in tensor.get("shape", ()):
        numbers *= int(size)
    return numbers * _BYTES[dtype]


def head_counts(name: str) -> tuple[int, int]:
    """Layers and heads of a model, from its config where that says them; else it is loaded."""
    try:
        config = json.loads((Path(resolve_model(name)) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    config = config if isinstance(config, dict) else {}
    for layers, heads in _NAMES:
        if isinstance(config.get(layers), int) and isinstance(config.get(heads), int):
            return config[layers], config[heads]
    with using(name) as model:
        return model.spec.n_layers, model.spec.n_heads


_NAMES = (
    ("num_hidden_layers", "num_attention_heads"),
    ("n_layer", "n_head"),
    ("n_layers", "n_heads"),
)
"""How configs call them."""


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    from workbench.memory import free_memory_bytes

    return free_memory_bytes()


def refuse_too_large(name: str, dtype: str = "auto") -> None:
    """Refuse a model that cannot fit before anything of it is loaded.

    Raises:
        ModelError: With the estimate.
    """
    needed = weight_bytes(name, dtype)
    if needed is None:
        return
    needed, free = int(needed * _HEADROOM), free_bytes()
    if needed > free:
        raise ModelError(
            f"a model must fit in memory; {name} needs about {needed / 1e9:.1f} GB with its "
            f"activations and {free / 1e9:.1f} GB are free; close programs, use a smaller dtype, or "
            "run it on a larger machine"
        )


@contextmanager
def using(name: str) -> Iterator[Any]:
    """A loaded model, for this thread alone while the block lasts.

    Raises:
        ModelError: It cannot be loaded, or is too large.
    """
    loaded = _load(name, _stamp(Path(resolve_model(name))))
    with loaded.lock:
        yield loaded.model


def _stamp(folder: Path) -> str:
    """Changes when a file of a local model does; hashing all weights again would take seconds."""
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    return " ".join(f"{path.name}:{path.stat().st_mtime_ns}" for path in files)


@st.cache_resource(max_entries=2, show_spinner="loading the model")
def _load(name: str, stamp: str) -> Loaded:
    refuse_too_large(name)
    from workbench.models.load import load

    return Loaded(load(name))
