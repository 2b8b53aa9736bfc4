"""ZeroTuning: scale the attention to the first token and renormalise the row.

With a the attention of one query, a_0 its weight on the first key and D = 1 + (gamma - 1) a_0:

    a'_0 = gamma a_0 / D,    a'_i = a_i / D

In output form, from the kernel's output o and the first value v_0 alone:

    o' = (o + (gamma - 1) a_0 v_0) / D

That is ``mode=score``: the same as adding log gamma to the score of the first key. ``mode=key``
multiplies the first key itself, and with it every query's score s on it: the same formulas with the
query's own gamma_q = exp((gamma - 1) s). Where s < 0 that lowers the weight; the two modes never
share a grid of gamma.

Every head may have a gamma of its own; where it is 1 the head stays bit for bit.

The first key is the first *attended* one, also under left padding. A query that sees only the
first key keeps its row, and so does one that cannot see it (behind a sliding window).

Paper: Han et al. 2025, "ZeroTuning", arXiv:2505.11739. Card: zerotuning sections 1-2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import (
    AttentionCall,
    AttentionEdit,
    Edit,
    RowCall,
    TiledCall,
    largest_gain,
)
from workbench.attention.key_scores import Factor, first_key_gain
from workbench.attention.scores import wide
from workbench.attention.streaming import PatternBlock
from workbench.errors import ConfigError
from workbench.interventions.base import LARGEST_FACTOR, Heads, heads_by_layer
from workbench.models.base import ModelSpec

ROUNDING = 2e-6
"""A row that sums to less than 1 by more than this has a learned sink, or is padding."""
LARGEST_LOG = 87.0
"""exp of more leaves float32; such a weight is the whole row already."""


@dataclass(frozen=True)
class ZeroTuning:
    """Scale the attention of some heads to the first token by ``gamma``."""

    gamma: float | tuple[float, ...]
    """One for all heads, or one for each of ``heads`` (of the model, layer by layer, without)."""
    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    name: str = "zerotuning"
    mode: str = "score"
    """``score``: the weight itself; ``key``: the first key, and with it the score."""

    def __post_init__(self) -> None:
        if isinstance(self.gamma, list | tuple):
            object.__setattr__(self, "gamma", tuple(float(gamma) for gamma in self.gamma))
            self._check_count()
        for gamma in self.gamma if isinstance(self.gamma, tuple) else (self.gamma,):
            if not 0.0 < gamma <= LARGEST_FACTOR:
                raise ConfigError(
                    f"gamma must be above 0 and at most {LARGEST_FACTOR:g}; got {gamma}; 1 changes nothing"
                )
        if self.mode not in ("score", "key"):
            raise ConfigError(f"mode must be score or key; got {self.mode}")

    def _check_count(self) -> None:
        """One gamma a head, and no head twice."""
        if self.heads is None:
            return  # counted when the model is known
        n_gammas, n_heads = len(self._gammas()), len(self.heads)
        if n_gammas != n_heads:
            raise ConfigError(
                f"gamma must be one number, or one for each of heads; got {n_gammas} for {n_heads} heads"
            )
        if len({tuple(head) for head in self.heads}) < n_heads:
            raise ConfigError(
                f"heads must be different where each has a gamma of its own; got {self.heads}"
            )

    def _gammas(self) -> tuple[float, ...]:
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer; none where every gamma is 1.

        Raises:
            ConfigError: A head that the model does not have, or not one gamma a head.
        """
        gammas = self.table(spec)
        if self.mode == "key":
            return [self._edit_key(layer, gammas[layer]) for layer in _changed(gammas)]
        biases: dict[tuple[float, ...], Tensor] = {}
        return [
            self._edit_score(
                # Layers with the same gammas share one bias, and so one mask a pass.
                layer,
                gammas[layer],
                biases.setdefault(tuple(gammas[layer].tolist()), gammas[layer].log()),
            )
            for layer in _changed(gammas)
        ]

    def table(self, spec: ModelSpec) -> Float[Tensor, "layer head"]:
        """Every head's gamma; 1 for those that are left alone.

        Raises:
            ConfigError: Another number of gammas than of heads.
        """
        found = torch.ones(spec.n_layers, spec.n_heads, dtype=torch.float64)
        grouped = heads_by_layer(self.heads, spec)
        if not isinstance(self.gamma, tuple):
            for layer, heads in grouped.items():
                found[layer, heads] = float(self.gamma)
        elif self.heads is not None:
            for (layer, head), gamma in zip(self.heads, self.gamma, strict=True):
                found[layer, head] = gamma
        elif len(self.gamma) != found.numel():
            raise ConfigError(
                f"gamma must be one number, or one for each of the {spec.n_layers} x {spec.n_heads} = "
                f"{found.numel()} heads of {spec.name}; got {len(self.gamma)}; name heads, or give all"
            )
        else:
            found = torch.tensor(self.gamma, dtype=torch.float64).view_as(found)
        return found

    def _edit_score(
        self, layer: int, gammas: Float[Tensor, " head"], bias: Float[Tensor, " head"]
    ) -> AttentionEdit:
        excess, by_head = (gammas - 1.0)[:, None], gammas[:, None]

        def output(call: AttentionCall, z: Tensor) -> Tensor:
            # (g - 1) a_0 / (1 + (g - 1) a_0), divided by a_0: where the key is hidden, 1 / a_0 is infinite.
            inverse = torch.exp(call.surprise(call.first_products()))
            above = excess.to(inverse)
            return _moved(z, above / (inverse + above), call.first_values())

        def pattern(pattern: Tensor, first_key: Tensor) -> Tensor:
            return scale_first_column(pattern, first_key, by_head)

        # Under a gamma below 1 a row that is all sink has D = gamma.
        gain = 1.0 / min(1.0, float(gammas.min()))
        return AttentionEdit(layer, output, pattern, first_key_bias=bias, gain=gain)

    def _edit_key(self, layer: int, gammas: Float[Tensor, " head"]) -> AttentionEdit:
        def leverage(call: AttentionCall) -> Float[Tensor, "batch head q_pos"]:
            """What the first key's weight gains, as a share of the row's sum before: D - 1."""
            products = call.first_products()
            before = torch.exp(-call.surprise(products))
            return torch.exp((-call.surprise(products, gammas)).clamp(max=LARGEST_LOG)) - before

        def output(call: AttentionCall, z: Tensor) -> Tensor:
            return _mixed(z, leverage(call), call.first_values())

        def checked(call: AttentionCall, z: Tensor) -> Tensor | None:
            """``output``, or None where dividing by D would lose too much of z."""
            found = leverage(call)
            # D = 1 + leverage divides the rounding of z, and a query's own gamma has no floor.
            if bool((found < 1.0 / largest_gain(z.dtype) - 1.0).any()):
                return None
            return _mixed(z, found, call.first_values())

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            """What changes the tiles of one call: the pattern's first column, each query by its own gamma."""
            by_query = _query_gammas(call.scores, call.first_key, gammas)

            def change(block: PatternBlock) -> Tensor:
                first = call.first_key[block.batches].clamp(0, block.pattern.shape[-1] - 1)
                gamma = by_query[block.batches, :, block.rows]
                return scale_first_column(block.pattern, first, gamma)

            return change

        def change(call: RowCall) -> Float[Tensor, "batch head"]:
            """What a decoded token's score on the first key gains; its row need not be made."""
            return first_key_gain(call.inputs, call.first_key, gammas)[..., 0]

        return AttentionEdit(layer, output, None, begin, checked=checked, first_key_change=change)


def _query_gammas(
    scores: Callable[[Tensor, Factor], Tensor],
    first_key: Int[Tensor, " batch"],
    gammas: Float[Tensor, " head"],
) -> Float[Tensor, "batch head q_pos"]:
    """Every query's own factor: exp(scaled score - score); 1 where the key is hidden."""
    columns = first_key[:, None]
    change = scores(columns, gammas) - scores(columns, 1)
    return torch.exp(change[..., 0].clamp(max=LARGEST_LOG)).nan_to_num(nan=1.0)


def _changed(gammas: Float[Tensor, "layer head"]) -> list[int]:
    """The layers in which some gamma is not 1."""
    found: list[int] = (gammas != 1.0).any(dim=1).nonzero()[:, 0].tolist()
    return found


def scale_first_key(
    z: Float[Tensor, "batch q_pos head d_value"],
    weight: Float[Tensor, "batch head q_pos"],
    value: Float[Tensor, "batch head d_value"],
    gamma: Float[Tensor, "*#batch_head_q_pos"],
) -> Float[Tensor, "batch q_pos head d_value"]:
    """The output form: from z, the weight on the first key and its value."""
    return _mixed(z, (gamma.to(weight) - 1.0) * weight, value)


def _mixed(
    z: Float[Tensor, "batch q_pos head d_value"],
    leverage: Float[Tensor, "batch head q_pos"],
    value: Float[Tensor, "batch head d_value"],
) -> Float[Tensor, "batch q_pos head d_value"]:
    """(z + leverage v_0) / (1 + leverage)."""
    return _moved(z, leverage / (1.0 + leverage), value)


def _moved(
    z: Float[Tensor, "batch q_pos head d_value"],
    step: Float[Tensor, "batch head q_pos"],
    value: Float[Tensor, "batch head d_value"],
) -> Float[Tensor, "batch q_pos head d_value"]:
    """A step from z towards v_0; where it is 0, z stays bit for bit."""
    moved = torch.lerp(wide(z), wide(value)[:, None], step.transpose(1, 2)[..., None])
    return moved.to(z.dtype)


def scale_first_column(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    first_key: Int[Tensor, " batch"],
    gamma: Float[Tensor, "*#batch_head_q_pos"],
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """The definition on the pattern: scale one column, renormalise the rows.

    Prompts whose first key lies below 0 (it has left a sliding window's cache) stay.
    """
    there = (first_key >= 0)[:, None, None, None]
    index = first_key.clamp(min=0)[:, None, None, None].expand(*pattern.shape[:3], 1)
    first = pattern.gather(-1, index)
    gamma = torch.where(there, gamma.to(pattern)[..., None], 1.0)
    scaled = pattern.scatter(-1, index, gamma * first)
    # D as a sum of what is there: 1 + (gamma - 1) a_0 has no digits left where it is near 0.
    outside = 1.0 - pattern.sum(dim=-1, keepdim=True)
    total = scaled.sum(dim=-1, keepdim=True) + torch.where(outside > ROUNDING, outside, 0.0)
    return torch.where((gamma != 1.0) & (total > 0.0), scaled / total, pattern)
