"""Attention of the toy models: sizes and variants, what is learned beside tokens, and the tap.

A learned key k* stands before the keys of every head, with a learned value v* or none; a value v*
may be added to the mix; or a learned token stands before the first (``ToyModelConfig.bias``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.model_kernels import FEATURES, KERNELS
from workbench.errors import ConfigError
from workbench.models.base import Site
from workbench.settings import check_settings, setting

Tap = Callable[[Site, Tensor], Tensor]
"""Shown the activation at a site; what it returns is used in its place."""

WHOLE_PATTERN = "whole_pattern"
"""Shown before ``pattern``, with the columns of learned keys, which no site of a model has."""


def leave(site: Site, x: Tensor) -> Tensor:
    """Change nothing: the tap of an ordinary forward pass."""
    return x


# Sizes and variants

BIASES = ("none", "key", "key-value", "value", "sink-token")


@dataclass(frozen=True)
class ToyModelConfig:
    """Sizes and variants."""

    d_vocab: int = setting(66, "token ids", low=2)
    n_ctx: int = setting(256, "longest sequence, in tokens", low=2)
    n_layers: int = setting(1, "blocks", low=1)
    n_heads: int = setting(1, "heads of a block", low=1)
    d_model: int = setting(256, "width of the residual stream", low=2)
    d_mlp: int = setting(1024, "width of the MLP; 0: none", low=0)
    norm: str = setting("pre", "where the norms stand", choices=("pre", "post"))
    positions: str = setting(
        "learned", "how positions enter", choices=("learned", "rotary", "none")
    )
    attention: str = setting("softmax", "kernel of the attention", choices=tuple(KERNELS))
    row_sum: float = setting(1.0, "sum of a row of softmax-scale", low=0.0, exclusive=True)
    bias: str = setting("none", "what each head can attend to besides tokens", choices=BIASES)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model must be a multiple of n_heads = {self.n_heads}; got {self.d_model}"
            )
        if self.positions == "rotary" and self.d_head % 2:
            raise ConfigError(f"rotary positions need an even d_head; got {self.d_head}")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def n_learned_keys(config: ToyModelConfig) -> int:
    """Columns of the whole pattern that belong to no token."""
    return int(config.bias in ("key", "key-value", "sink-token"))


# Attention

_LEARNED = {
    "none": (),
    "key": ("k_bias",),
    "key-value": ("k_bias", "v_bias"),
    "value": ("v_bias",),
    "sink-token": (),
}


class Attention(nn.Module):
    """Causal attention of one block."""

    W_Q: nn.Linear
    W_K: nn.Linear
    W_V: nn.Linear
    W_O: nn.Linear
    k_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, config: ToyModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kernel, self.feature = KERNELS[config.attention], FEATURES[config.attention]
        self.row_sum = config.row_sum if config.attention == "softmax-scale" else 1.0
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            self.add_module(name, nn.Linear(config.d_model, config.d_model, bias=False))
        for name in _LEARNED[config.bias]:
            self.register_parameter(name, nn.Parameter(torch.zeros(config.n_heads, config.d_head)))

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        visible: Tensor,
        rotation: Tensor | None,
        tap: Tap,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream, before norms and sums."""
        q, k, v = (self._heads(name, x) for name in ("W_Q", "W_K", "W_V"))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = self._see(tap, "q", q), self._see(tap, "k", k), self._see(tap, "v", v)
        k, v, visible = self._with_learned_key(k, v, visible)
        if tap is leave and self.config.attention == "softmax":
            z = self._mix_at_once(q, k, v, visible)
        else:
            z = self._mix(q, k, v, visible, tap)
        if self.config.bias == "value":
            z = z + self.v_bias
        z = self._see(tap, "z", z)
        out: Tensor = self.W_O(z.flatten(2))
        return self._see(tap, "attn_out", out)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, tap: Tap) -> Tensor:
        """Values mixed by the pattern, ``[batch pos head d_head]``; the definition."""
        product = torch.einsum("bqhd,bkhd->bhqk", self.feature(q), self.feature(k))
        scores = product / self.config.d_head**0.5
        scores = self._see(tap, "attn_scores", scores.masked_fill(~visible, -torch.inf))
        pattern = tap(Site(WHOLE_PATTERN, self.layer), self.kernel(scores, self.row_sum))
        pattern = self._see(tap, "pattern", pattern)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, v)

    def _mix_at_once(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """The same for softmax when nobody asks for the pattern."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return mixed.transpose(1, 2)

    def _heads(self, name: str, x: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        projected: Tensor = getattr(self, name)(x)
        return projected.unflatten(-1, (self.config.n_heads, self.config.d_head))

    def _with_learned_key(
        self, k: Tensor, v: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put k* and v* before the keys and values; every query sees them."""
        if self.config.bias not in ("key", "key-value"):
            return k, v, visible
        key = self.k_bias
        value = self.v_bias if self.config.bias == "key-value" else torch.zeros_like(key)
        k = torch.cat([key.expand(k.shape[0], 1, -1, -1), k], dim=1)
        v = torch.cat([value.expand(v.shape[0], 1, -1, -1), v], dim=1)
        return k, v, nn.functional.pad(visible, (1, 0), value=True)

    def _see(self, tap: Tap, name: str, x: Tensor) -> Tensor:
        return show(tap, Site(name, self.layer), x, self.config)


def show(tap: Tap, site: Site, x: Tensor, config: ToyModelConfig) -> Tensor:
    """Show a tap the tokens' part of an activation, without what was learned in front of them."""
    if tap is leave:
        return x
    rows, columns = int(config.bias == "sink-token"), n_learned_keys(config)
    part: tuple[Any, ...]
    if site.name in ("attn_scores", "pattern"):
        part = (..., slice(rows, None), slice(columns, None))
    else:
        part = (slice(None), slice(rows, None))
    shown = x[part]
    returned = tap(site, shown)
    if returned is shown:
        return x
    changed = x.clone()
    changed[part] = returned
    return changed


def rotation_of(positions: Int[Tensor, "batch pos"], d_head: int) -> Tensor:
    """Angles ``[batch pos 1 d_head/2]`` of rotary positions, base 10000."""
    rate = 10000.0 ** (-torch.arange(0, d_head, 2, device=positions.device) / d_head)
    return (positions[..., None] * rate)[:, :, None]


def rotate(
    x: Float[Tensor, "batch pos head d_head"], angle: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn the two halves of every head against each other."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
