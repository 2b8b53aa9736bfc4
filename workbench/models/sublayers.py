"""Single parts of a transformers model as functions: one block's MLP, the final norm.

The backends share them: what a bridge or nnsight wraps keeps the module tree of transformers.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import CapabilityError
from workbench.models.base import ModelSpec
from workbench.models.families import Family
from workbench.models.offload import at_hand


@runtime_checkable
class HasSublayers(Protocol):
    """A model whose MLP and final norm can be applied to any vector; every backend's are."""

    def mlp_of_embedding(self, layer: int, x: Float[Tensor, "n d_model"], *, norm: bool) -> Tensor:
        """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU."""
        ...

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Tensor:
        """Apply the norm before the unembedding; float32, CPU."""
        ...


_LN_MLP = {"gptj": "ln_1", "gpt_neo": "ln_2"}
"""Outside the hf backend: the norm before the MLP, by name."""


def mlp_of_embedding(
    model: Any,
    family: Family | None,
    spec: ModelSpec,
    layer: int,
    x: Float[Tensor, "n d_model"],
    *,
    norm: bool,
) -> Float[Tensor, "n d_model"]:
    """Apply one block's MLP to vectors, behind its norm if asked; float32, CPU.

    A norm that some families put on what the MLP adds (OLMo 2, Gemma 2 and 3) is not applied.

    Raises:
        CapabilityError: The architecture's MLP is no function of one vector, or not known.
    """
    ln_path, mlp_path = _paths(family, spec)
    assert family is not None  # _paths has refused
    block: Any = model.get_submodule(family.blocks)[layer]
    with torch.no_grad(), at_hand(block):
        x = x.to(next(block.parameters()))
        if norm and ln_path:
            x = block.get_submodule(ln_path)(x[None])[0]
        if mlp_path is None:  # OPT keeps the two halves in the block
            return block.fc2(block.activation_fn(block.fc1(x))).float().cpu()
        out = block.get_submodule(mlp_path)(x[None])
    return (out[0] if isinstance(out, tuple) else out)[0].float().cpu()


def _paths(family: Family | None, spec: ModelSpec) -> tuple[str | None, str | None]:
    if family is not None and (family.mlp or spec.family == "opt"):
        return family.ln_mlp, family.mlp
    if family is not None and spec.family in _LN_MLP:
        return _LN_MLP[spec.family], "mlp"
    raise CapabilityError(
        f"this needs an MLP that is a function of one vector and whose place is known; "
        f"{spec.family} has none; use a model of another architecture"
    )


def final_norm(
    model: Any, family: Family | None, resid: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Apply the norm before the unembedding; float32, CPU.

    Raises:
        CapabilityError: The architecture is not known.
    """
    if family is None:
        raise CapabilityError(
            "the final norm must be known by name; of this architecture it is not; use a model of "
            "another architecture"
        )
    norm: Any = model.get_submodule(family.ln_final)
    with torch.no_grad(), at_hand(norm):
        return norm(resid.to(next(norm.parameters(), resid))).float().cpu()
