"""What produced a number: keys of results and requests, and the versions at work.

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
    versions = {name.replace("-", "_"): _version(name) for name in PACKAGES}
    return {
        "workbench": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        **versions,
    }


@cache  # nothing is installed while we run, and a sweep asks for each of its cells
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
