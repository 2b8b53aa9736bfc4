"""ZeroTuning: scale the attention to the first token and renormalise the row.

With a the attention of one query, a_0 its weight on the first key and D = 1 + (gamma - 1) a_0:

    a'_0 = gamma a_0 / D,    a'_i = a_i / D

In output form, from the kernel's output o and the first value v_0 alone:

    o' = (o + (gamma - 1) a_0 v_0) / D

That is ``mode=score``: the same as adding log gamma to the score of the first key. ``mode=key``
multiplies the first key itself, and with it every query's score s on it: the same formulas with the
query's own gamma_q = exp((gamma - 1) s). Where s < 0 that lowers the weight; the two modes never
share a grid of gamma.

The first key is the first *attended* one, also under left padding. A query that sees only the
first key keeps its row, and so does one that cannot see it (behind a sliding window).

Paper: Han et al. 2025, "ZeroTuning", arXiv:2505.11739. Card: zerotuning sections 1-2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit, TiledCall
from workbench.attention.streaming import PatternBlock
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
    mode: str = "score"
    """``score``: the weight itself; ``key``: the first key, and with it the score."""

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma < float("inf"):
            raise ConfigError(f"gamma must be above 0; got {self.gamma}; 1 changes nothing")
        if self.mode not in ("score", "key"):
            raise ConfigError(f"mode must be score or key; got {self.mode}")

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer; none for gamma = 1."""
        grouped = heads_by_layer(self.heads, spec)
        if self.gamma == 1.0:
            return []
        edit = self._edit_score if self.mode == "score" else self._edit_key
        return [edit(layer, heads) for layer, heads in grouped.items()]

    def _edit_score(self, layer: int, heads: list[int]) -> AttentionEdit:
        gamma = torch.tensor(float(self.gamma))

        def output(call: AttentionCall, z: Tensor) -> Tensor:
            return _scaled_output(call, z, heads, gamma)

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            edited = pattern.clone()
            edited[:, heads] = scale_first_column(pattern[:, heads], first_key, gamma)
            return edited

        return AttentionEdit(layer, output, pattern)

    def _edit_key(self, layer: int, heads: list[int]) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            return _scaled_output(
                call, z, heads, self._gammas(call.scores, call.first_key_index(), heads)
            )

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            gammas = self._gammas(call.scores, call.first_key, heads)

            def change(block: PatternBlock) -> Tensor:
                first = call.first_key[block.batches].clamp(0, block.pattern.shape[-1] - 1)
                gamma = gammas[block.batches, :, block.rows]
                edited = block.pattern.clone()
                edited[:, heads] = scale_first_column(block.pattern[:, heads], first, gamma)
                return edited

            return change

        return AttentionEdit(layer, output, None, begin)

    def _gammas(
        self,
        scores: Callable[[Tensor, float | int], Tensor],
        first_key: Int[Tensor, " batch"],
        heads: list[int],
    ) -> Float[Tensor, "batch head q_pos"]:
        """Every query's own factor: exp(scaled score - score); 1 where the key is hidden."""
        columns = first_key[:, None]
        change = scores(columns, self.gamma)[:, heads] - scores(columns, 1)[:, heads]
        return torch.exp(change[..., 0]).nan_to_num(nan=1.0)


def _scaled_output(
    call: AttentionCall, z: Tensor, heads: list[int], gamma: Tensor
) -> Float[Tensor, "batch q_pos head d_value"]:
    first = call.first_key_index()[:, None]
    weight, value = call.weights(first)[:, heads, :, 0], call.values(first)[:, heads, 0]
    edited = z.clone()
    edited[:, :, heads] = scale_first_key(z[:, :, heads], weight, value, gamma).to(z.dtype)
    return edited


def scale_first_key(
    z: Float[Tensor, "batch q_pos head d_value"],
    weight: Float[Tensor, "batch head q_pos"],
    value: Float[Tensor, "batch head d_value"],
    gamma: Float[Tensor, "*#batch_head_q_pos"],
) -> Float[Tensor, "batch q_pos head d_value"]:
    """The output form: from z, the weight on the first key and its value."""
    leverage = ((gamma.to(weight) - 1.0) * weight).transpose(1, 2)[..., None]
    return (z.float() + leverage * value.float()[:, None]) / (1.0 + leverage)


def scale_first_column(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    first_key: Int[Tensor, " batch"],
    gamma: Float[Tensor, "*#batch_head_q_pos"],
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """The definition on the pattern: scale one column, renormalise the rows."""
    index = first_key[:, None, None, None].expand(*pattern.shape[:3], 1)
    first, gamma = pattern.gather(-1, index), gamma.to(pattern)[..., None]
    scaled = pattern.scatter(-1, index, gamma * first)
    return scaled / (1.0 + (gamma - 1.0) * first)
