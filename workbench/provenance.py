"""What produced a number: keys of results and requests, the versions at work, and all of it in words.

Nothing here imports torch, and nothing says who ran it or where: no user, host or absolute path.
"""

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from workbench import __version__
from workbench.errors import ConfigError

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "transformer-lens",
    "nnsight",
)

MOST_NAMED = 3
"""Heads of an intervention that are named in a list; of more their number is."""


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII, floats by ``repr``.

    Tuples are written as lists; 1 and 1.0 stay different.

    Raises:
        ConfigError: A float that is not finite.
        TypeError: Something that is not None, bool, int, float, str, list, tuple or mapping.
    """
    plain = _plain(value, "value")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any, where: str) -> Any:
    # Exact types: a numpy float is a float too, but its text may differ between versions.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number; got {value}")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{where} must have texts as keys; got {key!r}")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} must be plain JSON data; got {type(value).__name__}")


def content_key(fields: Mapping[str, Any]) -> str:
    """SHA-256 of everything that can change a result's numbers: the result's name."""
    return hashlib.sha256(b"result\n" + canonical_json(fields)).hexdigest()


def request_hash(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a request as it was made, before a model is loaded or a text tokenised.

    It leads a repeated request to its result without torch. It can never be taken for a
    ``content_key``: the same fields give another hash.
    """
    return hashlib.sha256(b"request\n" + canonical_json(fields)).hexdigest()


def environment() -> dict[str, str | None]:
    """Versions of Python, the platform, the workbench and its libraries (None: not installed)."""
    versions = {name.replace("-", "_"): package_version(name) for name in PACKAGES}
    return {
        "workbench": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        **versions,
    }


@cache  # nothing is installed while we run, and a sweep asks for each of its cells
def package_version(package: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_name(provenance: Mapping[str, Any]) -> str:
    """The model's name in a provenance, where ``model`` is a name or a mapping with ``name``."""
    model = provenance.get("model", "")
    return str(model.get("name", "")) if isinstance(model, Mapping) else str(model)


def edit_text(provenance: Mapping[str, Any]) -> str:
    """The interventions of a provenance in words, ``ZeroTuning gamma=1.5``; "" where none is."""
    edits = provenance.get("interventions")
    if not isinstance(edits, list | tuple):
        return ""
    return " + ".join(_edit_words(edit) for edit in edits if isinstance(edit, Mapping))


def _edit_words(edit: Mapping[str, Any]) -> str:
    words = [str(edit.get("type", "edited"))]
    for name, value in edit.items():
        if name == "heads" and isinstance(value, list | tuple):
            few = len(value) <= MOST_NAMED and all(map(_is_pair, value))
            named = ",".join(f"L{layer}H{head}" for layer, head in value) if few else ""
            words.append(named or f"{len(value)} heads")
        elif name not in ("type", "name") and value is not None:
            words.append(f"{name}={value if not isinstance(value, str) else value[:12]}")
    return " ".join(words)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2
