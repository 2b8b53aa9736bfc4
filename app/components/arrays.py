"""The numbers of a plotly trace: a copied figure holds them as base64 text."""

import base64
from typing import Any

import numpy as np

_TYPES = {
    "f4": "<f4", "f8": "<f8", "i1": "<i1", "i2": "<i2", "i4": "<i4",
    "u1": "<u1", "u2": "<u2", "u4": "<u4",
}  # fmt: skip


def array_of(values: Any) -> np.ndarray:
    """The numbers (or names) of one field of a trace, whichever way plotly holds them."""
    if isinstance(values, dict) and "bdata" in values:
        flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=_TYPES[values["dtype"]])
        shape = values.get("shape")
        if shape is None:
            return flat
        return flat.reshape([int(size) for size in str(shape).split(",")])
    return np.asarray(values)
