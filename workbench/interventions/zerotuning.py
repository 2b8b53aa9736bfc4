"""ZeroTuning: scale the attention to the first token and renormalise the row.

With a the attention of one query, a_0 its weight on the first key and D = 1 + (gamma - 1) a_0:

    a'_0 = gamma a_0 / D,    a'_i = a_i / D

In output form, from the kernel's output o and the first value v_0 alone:

    o' = (o + (gamma - 1) a_0 v_0) / D

The first key is the first *attended* one, also under left padding. A query that sees only the
first key keeps its row.

Paper: Han et al. 2025, "ZeroTuning", arXiv:2505.11739. Card: zerotuning sections 1-2.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.models.base import ModelSpec


@dataclass(frozen=True)
class ZeroTuning:
    """Scale the attention of some heads to the first token by ``gamma``."""

    gamma: float
    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    name: str = "zerotuning"

    def __post_init__(self) -> None:
        if not self.gamma > 0.0:
            raise ConfigError(f"gamma must be above 0; got {self.gamma}; 1 changes nothing")

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer; none for gamma = 1."""
        grouped = heads_by_layer(self.heads, spec)
        if self.gamma == 1.0:
            return []
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            changed = scale_first_key(
                z[:, :, heads],
                call.first_key_weight()[:, heads],
                call.first_value()[:, heads],
                self.gamma,
            )
            edited = z.clone()
            edited[:, :, heads] = changed.to(z.dtype)
            return edited

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            edited = pattern.clone()
            edited[:, heads] = scale_first_column(pattern[:, heads], first_key, self.gamma)
            return edited

        return AttentionEdit(layer, output, pattern)


def scale_first_key(
    z: Float[Tensor, "batch q_pos head d_value"],
    weight: Float[Tensor, "batch head q_pos"],
    value: Float[Tensor, "batch head d_value"],
    gamma: float,
) -> Float[Tensor, "batch q_pos head d_value"]:
    """The output form: from z, the weight on the first key and its value."""
    leverage = (gamma - 1.0) * weight.transpose(1, 2)[..., None]
    return (z.float() + leverage * value.float()[:, None]) / (1.0 + leverage)


def scale_first_column(
    pattern: Float[Tensor, "batch head q_pos k_pos"], first_key: Int[Tensor, " batch"], gamma: float
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """The definition on the pattern: scale one column, renormalise the rows."""
    index = first_key[:, None, None, None].expand(*pattern.shape[:3], 1)
    first = pattern.gather(-1, index)
    scaled = pattern.scatter(-1, index, gamma * first)
    return scaled / (1.0 + (gamma - 1.0) * first)
