"""Zero ablation: a head's output z is zero at every position.

    z'[h] = 0

What the head writes everywhere alike is gone too; ``MeanHeads`` leaves it.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import ActivationEdit, Edit
from workbench.interventions.base import Heads, heads_by_layer
from workbench.models.base import ModelSpec, Site


@dataclass(frozen=True)
class ZeroHeads:
    """Set the output z of some heads to zero (before W_O), at every position."""

    heads: Heads
    name: str = "zero-heads"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer."""
        return [
            ActivationEdit(Site("z", layer), _zero(heads))
            for layer, heads in heads_by_layer(self.heads, spec).items()
        ]


def _zero(heads: list[int]):  # type: ignore[no-untyped-def]
    def change(z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        kept = z.clone()
        kept[:, :, heads] = 0.0
        return kept

    return change
