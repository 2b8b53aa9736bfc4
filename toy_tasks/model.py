"""One small attention model for the toy tasks, in variants chosen by name.

Every block adds attention and, if asked, a ReLU MLP to the residual stream h:

    pre-norm:   h' = h + Attn(LN(h)),   h'' = h' + MLP(LN(h')),   logits = LN(h'') W_U
    post-norm:  h' = LN(h + Attn(h)),   h'' = LN(h' + MLP(h')),   logits = h'' W_U

With scores S = q k^T / sqrt(d_head), a kernel makes the weights A of the visible keys (KERNELS):

    softmax                 exp(S) / sum exp(S)
    softmax-scale           row_sum * exp(S) / sum exp(S)
    relu                    relu(S) / n, n the number of visible keys
    sigmoid, elu            sigmoid(S); elu(S) + 1
    elu-kernel              phi(q) phi(k)^T / sqrt(d_head), phi = elu + 1
    sigmoid-normalised, elu-normalised, elu-kernel-normalised     the same over their row sums

and a bias gives each head something of its own to attend to (BIASES): a learned key k*, with a
learned value v* or none; a value v* added to the mix; or a learned token before the first.

The forward pass shows every activation to a ``tap``, which may return another in its place: reading,
ablating and editing are the same act. Dense patterns are made; the models are small.

Paper: Guo et al. 2024, arXiv:2410.13835 (relu kernel, sizes); Gu et al. 2024, arXiv:2410.10781
(the other kernels and the biases).
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.model_attention import (
    BIASES,
    WHOLE_PATTERN,
    Attention,
    Tap,
    ToyModelConfig,
    leave,
    n_learned_keys,
    rotation_of,
    show,
)
from toy_tasks.model_kernels import KERNELS, NORMALISED
from workbench.models.base import Site

__all__ = [
    "BIASES",
    "KERNELS",
    "NORMALISED",
    "WHOLE_PATTERN",
    "Output",
    "Tap",
    "ToyModel",
    "ToyModelConfig",
    "describe_model",
    "leave",
    "make_model",
    "model_from",
    "n_learned_keys",
]


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Float[Tensor, "batch pos d_vocab"]


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
                nn.ReLU(inplace=True),
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
        h = tap(Site("embed"), self.embed(tokens))
        if self.config.positions == "learned":
            # Rows that all prompts share are added as one matrix, whose gradient is a plain sum.
            shared = position_ids is None
            h = h + (self.position.weight[:n_pos] if shared else self.position(position_ids))
        if position_ids is None:
            position_ids = torch.arange(n_pos, device=tokens.device).expand(batch, n_pos)
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
        return Output(self.unembed(h if h.shape[1] == n_pos else h[:, h.shape[1] - n_pos :]))


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
