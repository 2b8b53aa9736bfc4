"""JSON that every reader accepts, also where a number is NaN or infinite."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def jsonable(value: Any, nan: str | None = None) -> Any:
    """Turn a value into what strict JSON can hold.

    Args:
        value: Numbers, texts, mappings, sequences, arrays, dataclasses, in any nesting; anything
            else is kept as its text.
        nan: What NaN becomes; infinities always become "Infinity" and "-Infinity".
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _finite_or_name(value, nan)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value), nan)
    if isinstance(value, Mapping):
        return {str(name): jsonable(item, nan) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "tolist"):
        return jsonable(value.tolist(), nan)
    if isinstance(value, set | frozenset):
        return [jsonable(item, nan) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [jsonable(item, nan) for item in value]
    return str(value)


def _finite_or_name(value: float, nan: str | None) -> float | str | None:
    if math.isnan(value):
        return nan
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def read_number(value: float | str | None) -> float:
    """The number that ``jsonable`` wrote; null is NaN, and "Infinity" is what it says."""
    return math.nan if value is None else float(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON of a value (``jsonable`` says how), as one line unless ``indent`` is given."""
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)


# What another process writes may be cut off, and what somebody edited may be anything.


def object_of(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; empty where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that another process writes; empty where there is none yet."""
    try:
        return object_of(path.read_bytes())
    except OSError:
        return {}


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file of one a line; a line that is none, or cut off, is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    yield from filter(None, map(object_of, lines))
