"""A model's weights: one by name in TransformerLens' layout, and whether all of them are finite."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CapabilityError
from workbench.models.base import ModelSpec
from workbench.models.families import Family
from workbench.models.offload import at_hand
from workbench.models.projections import w_o_heads
from workbench.models.state_space import read_state_space


def check_finite(model: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity, or None."""
    for place, module in model.named_modules():
        # A block is looked at part by part: it may be larger than the memory that is left.
        with at_hand(module) if next(module.children(), None) is None else nullcontext():
            for name, parameter in module.named_parameters(place, recurse=False):
                is_there = parameter.device.type != "meta"
                if is_there and not bool(torch.isfinite(parameter).all()):
                    return name
    return None


def read_weight(
    model: Any, family: Family, spec: ModelSpec, name: str, layer: int | None = None
) -> Tensor:
    """One weight in TransformerLens' layout, float32 on the CPU; see ``base.WEIGHTS``.

    Raises:
        CapabilityError: The architecture has no such weight, or the table does not know where.
    """
    home = home_of_weight(model, family, spec, name, layer)
    with at_hand(home):
        return _weight(home, family, spec, name, layer).detach().float().cpu()


def home_of_weight(
    model: Any, family: Family, spec: ModelSpec, name: str, layer: int | None
) -> Any:
    """The module that holds a weight: an embedding, or a block.

    Raises:
        CapabilityError: There is no such weight, or no such layer.
    """
    if name == "W_E":
        return model.get_input_embeddings()
    if name == "W_U":
        return model.get_output_embeddings()
    if name == "W_pos" and family.position_table:
        return model.get_submodule(family.position_table)
    if layer is not None and 0 <= layer < spec.n_layers:
        return model.get_submodule(family.blocks)[layer]
    raise _no_weight(spec, name, layer)


def _no_weight(spec: ModelSpec, name: str, layer: int | None) -> CapabilityError:
    return CapabilityError(
        f"{spec.family} has no weight {name} at layer {layer}; see workbench.models.base.WEIGHTS"
    )


def _weight(home: Any, family: Family, spec: ModelSpec, name: str, layer: int | None) -> Tensor:
    if name == "W_E":
        return home.weight
    if name == "W_U":
        return home.weight.T
    if name == "W_pos":
        return home.weight[family.position_offset :]
    if name in ("W_Q", "W_K", "W_V") and family.read_qkv:
        return family.read_qkv(home, spec)[("W_Q", "W_K", "W_V").index(name)]
    if name == "W_O" and family.w_o:
        return w_o_heads(home.get_submodule(family.w_o), spec.n_heads)
    found = read_state_space(home.mixer, name) if hasattr(home, "mixer") else None
    if found is None:
        raise _no_weight(spec, name, layer)
    return found
