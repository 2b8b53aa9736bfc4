"""One small attention model for the toy tasks, in variants chosen by name.

Every block adds attention and, if asked, a ReLU MLP to the residual stream h:

    pre-norm:   h' = h + Attn(LN(h)),   h'' = h' + MLP(LN(h')),   logits = LN(h'') W_U
    post-norm:  h' = LN(h + Attn(h)),   h'' = LN(h' + MLP(h')),   logits = h'' W_U

With scores S = q k^T / sqrt(d_head), a kernel makes the weights A of the visible keys (KERNELS):

    softmax                 exp(S) / sum exp(S)
    softmax-scale           row_sum * exp(S) / sum exp(S)
    relu                    relu(S) / n, n the number of visible keys
    sigmoid, elu            sigmoid(S); elu(S) + 1
    sigmoid-normalised, elu-normalised     the same over their row sums

and a bias gives each head something of its own to attend to (BIASES): a learned key k*, with a
learned value v* or none; a value v* added to the mix; or a learned token before the first.

The forward pass shows every activation to a ``tap``, which may return another in its place: reading,
ablating and editing are the same act. Dense patterns are made; the models are small.

Paper: Guo et al. 2024, arXiv:2410.13835 (relu kernel, sizes); Gu et al. 2024, arXiv:2410.10781
(the other kernels and the biases).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import ConfigError
from workbench.models.base import Site
from workbench.settings import check_settings, setting

Tap = Callable[[Site, Tensor], Tensor]
"""Shown the activation at a site; what it returns is used in its place."""

Scores = Float[Tensor, "batch head q_pos k_pos"]
"""Masked entries are -inf."""

WHOLE_PATTERN = "whole_pattern"
"""Shown before ``pattern``, with the columns of learned keys, which no site of a model has."""


def leave(site: Site, x: Tensor) -> Tensor:
    """Change nothing: the tap of an ordinary forward pass."""
    return x


# Kernels: scores to weights


def softmax(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Ordinary attention. A row that sees nothing (padding) is 0, not NaN."""
    return torch.where(scores > -torch.inf, row_sum * scores.softmax(dim=-1), 0.0)


def relu(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Positive scores over the number of visible keys."""
    n_visible = (scores > -torch.inf).sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.relu() / n_visible


def sigmoid(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Every key weighed on its own."""
    return scores.sigmoid()


def elu(scores: Scores, row_sum: float = 1.0) -> Scores:
    """Linear above 0, exponential below."""
    return nn.functional.elu(scores) + 1.0


def normalised(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel whose rows are made to sum to 1."""

    def apply(scores: Scores, row_sum: float = 1.0) -> Scores:
        weights = kernel(scores)
        return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-8)

    return apply


KERNELS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "relu": relu,
    "sigmoid": sigmoid,
    "sigmoid-normalised": normalised(sigmoid),
    "elu": elu,
    "elu-normalised": normalised(elu),
    "softmax-scale": softmax,
}
NORMALISED = frozenset({"softmax", "sigmoid-normalised", "elu-normalised"})
"""Kernels whose rows sum to 1."""
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


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Float[Tensor, "batch pos d_vocab"]


# Attention


class Attention(nn.Module):
    """Causal attention of one block."""

    def __init__(self, config: ToyModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kernel = KERNELS[config.attention]
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
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.config.d_head**0.5
        scores = self._see(tap, "attn_scores", scores.masked_fill(~visible, -torch.inf))
        pattern = tap(Site(WHOLE_PATTERN, self.layer), self.kernel(scores, self.row_sum))
        pattern = self._see(tap, "pattern", pattern)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        if self.config.bias == "value":
            z = z + self.get_parameter("v_bias")
        z = self._see(tap, "z", z)
        out: Tensor = self.get_submodule("W_O")(z.flatten(2))
        return self._see(tap, "attn_out", out)

    def _heads(self, name: str, x: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        projected: Tensor = self.get_submodule(name)(x)
        return projected.unflatten(-1, (self.config.n_heads, self.config.d_head))

    def _with_learned_key(
        self, k: Tensor, v: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put k* and v* before the keys and values; every query sees them."""
        if self.config.bias not in ("key", "key-value"):
            return k, v, visible
        key = self.get_parameter("k_bias")
        has_value = self.config.bias == "key-value"
        value = self.get_parameter("v_bias") if has_value else torch.zeros_like(key)
        k = torch.cat([key.expand(k.shape[0], 1, -1, -1), k], dim=1)
        v = torch.cat([value.expand(v.shape[0], 1, -1, -1), v], dim=1)
        return k, v, nn.functional.pad(visible, (1, 0), value=True)

    def _see(self, tap: Tap, name: str, x: Tensor) -> Tensor:
        return show(tap, Site(name, self.layer), x, self.config)


_LEARNED = {
    "none": (),
    "key": ("k_bias",),
    "key-value": ("k_bias", "v_bias"),
    "value": ("v_bias",),
    "sink-token": (),
}


def n_learned_keys(config: ToyModelConfig) -> int:
    """Columns of the whole pattern that belong to no token."""
    return int(config.bias in ("key", "key-value", "sink-token"))


def show(tap: Tap, site: Site, x: Tensor, config: ToyModelConfig) -> Tensor:
    """Show a tap the tokens' part of an activation, without what was learned in front of them."""
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


# Blocks and the model


class Block(nn.Module):
    """Attention and MLP with their norms."""

    def __init__(self, config: ToyModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.ln_attn = nn.LayerNorm(config.d_model)
        self.attention = Attention(config, layer)
        if config.d_mlp:
            self.ln_mlp = nn.LayerNorm(config.d_model)
            self.mlp = nn.Sequential(
                nn.Linear(config.d_model, config.d_mlp, bias=False),
                nn.ReLU(),
                nn.Linear(config.d_mlp, config.d_model, bias=False),
            )

    def forward(self, h: Tensor, visible: Tensor, rotation: Tensor | None, tap: Tap) -> Tensor:
        """Pass the residual stream ``[batch pos d_model]`` on."""

        def attend(x: Tensor) -> Tensor:
            added: Tensor = self.attention(x, visible, rotation, tap)
            return added

        def think(x: Tensor) -> Tensor:
            return self._see(tap, "mlp_out", self.mlp(x))

        h = self._see(tap, "resid_pre", h)
        h = self._see(tap, "resid_mid", self._add(h, attend, self.ln_attn))
        if self.config.d_mlp:
            h = self._add(h, think, self.ln_mlp)
        return self._see(tap, "resid_post", h)

    def _add(self, h: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.config.norm == "pre":
            return h + part(norm(h))
        result: Tensor = norm(h + part(h))
        return result

    def _see(self, tap: Tap, name: str, x: Tensor) -> Tensor:
        return show(tap, Site(name, self.layer), x, self.config)


class ToyModel(nn.Module):
    """Tokens to logits; see the module's docstring."""

    def __init__(self, config: ToyModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        if config.positions == "learned":
            self.position = nn.Embedding(config.n_ctx, config.d_model)
        if config.bias == "sink-token":
            self.sink_token = nn.Parameter(torch.randn(1, 1, config.d_model))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_final = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        tap: Tap = leave,
    ) -> Output:
        """Predict the next token at every position."""
        batch, n_pos = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(n_pos, device=tokens.device).expand(batch, n_pos)
        h = tap(Site("embed"), self.embed(tokens))
        if self.config.positions == "learned":
            h = h + self.position(position_ids)
        visible = visible_keys(n_pos, attention_mask, tokens.device)
        if self.config.bias == "sink-token":
            h = torch.cat([self.sink_token.expand(batch, 1, -1), h], dim=1)
            visible = nn.functional.pad(visible, (1, 0), value=True)
            visible = nn.functional.pad(visible, (0, 0, 1, 0), value=False)
            visible[..., 0, 0] = True
            position_ids = nn.functional.pad(position_ids, (1, 0), value=-1)
        rotation = None
        if self.config.positions == "rotary":
            rotation = rotation_of(position_ids, self.config.d_head)
        for block in self.blocks:
            h = block(h, visible, rotation, tap)
        h = show(tap, Site("ln_final"), self.ln_final(h), self.config)
        return Output(self.unembed(h[:, h.shape[1] - n_pos :]))


def visible_keys(n_pos: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """``[batch or 1, 1, q_pos, k_pos]``: keys at or before the query that are no padding."""
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()[None, None]
    if attention_mask is None:
        return causal
    return causal & attention_mask.to(device)[:, None, None].bool()


def make_model(config: ToyModelConfig, seed: int) -> ToyModel:
    """Draw a model's weights (torch's own initialisation) from a seed, nothing else disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyModel(config)


def describe_model(config: ToyModelConfig) -> dict[str, Any]:
    """The config as JSON data; ``model_from`` reads it."""
    return {"model_type": "toy", "sizes": asdict(config)}


def model_from(described: dict[str, Any]) -> ToyModel:
    """Make an empty model from its description."""
    return ToyModel(ToyModelConfig(**described["sizes"]))
