"""A device that is not there: tensors that say they are on it, and compute on the CPU.

Code that chooses its way by the device takes the way of a GPU, and an operation on tensors of two devices is
refused as CUDA refuses it. torch knows one such backend a process and does not forget it, so that this
module belongs into a process of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")

_MOVES = ("aten._to_copy.default", "aten.copy_.default")
_INDEXES = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")
"""Operations that take tensors of several devices; an index may be on the CPU."""


class Pretended(Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    held: Tensor

    def __new__(cls, held: Tensor, device: torch.device) -> "Pretended":
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=device, **sizes
        )

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """As of the CPU: torch has no way of its own for such tensors."""
        return self.held.tolist()


class Pretending(TorchDispatchMode):
    """Within the context, new tensors can be made on the device too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def put(module: nn.Module, index: int) -> None:
    """Put a module's weights on one of the devices."""
    device = torch.device("pretended", index)
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                moved = Pretended(_held(weight.data), device)
                each._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = Pretended(_held(buffer), device)


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Pretended) else x


def _device(given: Any) -> torch.device:
    device = torch.device("pretended", 0) if given is None else torch.device(given)
    is_first = device.type == "pretended" and device.index is None
    return torch.device("pretended", 0) if is_first else device


def _place(name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> torch.device:
    """Where an operation's result is.

    Raises:
        RuntimeError: Its tensors are on several devices.
    """
    if kwargs.get("device") is not None:
        return _device(kwargs["device"])
    if not tensors:
        return torch.device("cpu")
    if name in _MOVES:
        return tensors[0].device
    # A single number on the CPU goes with any device.
    devices = {x.device for x in tensors if x.dim() > 0 or x.device.type != "cpu"}
    if name in _INDEXES:
        devices -= {torch.device("cpu")} if tensors[0].device.type != "cpu" else set()
    if len(devices) > 1:
        shapes = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{name} has tensors of several devices: {shapes}")
    return next(iter(devices), torch.device("cpu"))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    place = _place(name, tensors, kwargs)
    if name == "aten._fused_sdp_choice.default":
        return 0  # its plain definition, which is made of operations that are seen here
    args, kwargs = tree_map_only(Tensor, _held, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*args, **kwargs)
    if place.type == "cpu":
        return found
    # What is changed in place is the tensor that was given.
    given = {id(x.held): x for x in tensors if isinstance(x, Pretended)}

    def wrapped(x: Tensor) -> Tensor:
        return given[id(x)] if id(x) in given else Pretended(x, place)

    return tree_map_only(Tensor, wrapped, found)


# What torch calls beneath the mode: a tensor from a list, an index from a list of numbers.


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Any:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype), _device(device))


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return Pretended(torch.empty(size, dtype=dtype), _device(device))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
