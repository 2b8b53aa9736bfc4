"""Weights that are elsewhere until their module runs: what ``device_map`` put on a disk or a CPU.

accelerate leaves such parameters empty (device ``meta``) and fills them for each forward pass.
Whoever reads a weight outside of one must have it filled first.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Within the context, every parameter of a module and of its parts holds its numbers."""
    absent = [part for part in module.modules() if _is_offloaded(part)]
    with ExitStack() as stack:
        if absent:
            from accelerate.utils import align_module_device

            for part in absent:
                stack.enter_context(align_module_device(part))
        yield


def _is_offloaded(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return hasattr(module, "_hf_hook") and any(each.device.type == "meta" for each in own)


def running_device(module: nn.Module) -> torch.device:
    """Where a module computes, whether or not its parameters are there now."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def tensors_at_hand(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of ``state_dict()`` by name, in order, each filled while it is looked at."""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type != "meta":
            yield name, tensor
            continue
        path, _, own = name.rpartition(".")
        home = model.get_submodule(path)
        with at_hand(home):
            yield name, getattr(home, own)
