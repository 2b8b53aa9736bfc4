"""One tensor of an intervention, from a safetensors file: never a pickle."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import DataError


def read_tensor(path: str, name: str) -> Float[Tensor, "..."]:
    """Read the tensor ``name`` of a file, as float32.

    Raises:
        DataError: No such file, not safetensors, no such tensor, or not floating-point numbers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with Path(path).open("rb"):
            pass  # safetensors' own words for a missing file are not ours
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (getattr(error, "strerror", None) or "no such file").lower()
        raise DataError(f"{name} must be in a file that can be read; {path}: {reason}") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if name not in names:
                raise DataError(
                    f"{path} must hold a tensor {name}; it holds {', '.join(names) or 'nothing'}"
                )
            found: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{name} must be in a safetensors file; {path}: {reason}") from error
    if not found.is_floating_point():
        raise DataError(f"{name} of {path} must be floating-point numbers; got {found.dtype}")
    return found.to(torch.float32)
