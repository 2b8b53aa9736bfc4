"""Settings and result of ``probes.attention_sinks``, and the ratios that sum it up."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ConfigError
from workbench.settings import check_settings, setting

PAPER_THRESHOLD = 0.3

MIN_POS = 10
"""Uniform attention scores H_T / T at position 0: 0.314 for T = 9, 0.293 for T = 10."""


@dataclass(frozen=True)
class AttentionSinkConfig:
    """Defaults are the paper's."""

    threshold: float | None = setting(
        None,
        "a score above this is a sink; none: the paper's 0.3, and prompts under 10 tokens are refused",
        low=0.0,
        high=1.0,
        exclusive=True,
    )
    position: int = setting(
        0, "the key position that is judged, counted from 0", low=0, unit="tokens"
    )
    inputs: str = setting(
        "natural",
        "the prompts as they are, random ids, one id repeated, or repeated with positions swapped",
        choices=("natural", "random", "repeat", "swap"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.inputs == "swap" and self.position == 0:
            raise ConfigError(
                "inputs=swap swaps the position embeddings of 0 and position, so position must be at "
                "least 1; got 0; set e.g. position=5"
            )

    @property
    def bound(self) -> float:
        """The threshold that is used."""
        return PAPER_THRESHOLD if self.threshold is None else self.threshold


@dataclass(frozen=True)
class AttentionSinkResult:
    """Sink scores and norms of one model on one set of prompts; NaN past a prompt's end."""

    score: Float[Tensor, "batch layer head pos"]
    """alpha, in [0, 1]."""
    key_norm: Float[Tensor, "layer kv_head pos"]
    """Mean over prompts of |k| (after rotary, which keeps norms)."""
    value_norm: Float[Tensor, "layer kv_head pos"]
    """Mean over prompts of |v|."""
    ov_norm: Float[Tensor, "layer head pos"]
    """Mean over prompts of |v W_O|."""
    resid_norm: Float[Tensor, "entry_and_layer pos"]
    """Mean over prompts of |h|: at the entry, then after each block, before the final norm."""
    qk_cosine: Float[Tensor, "layer head pos"]
    """Mean over prompts and queries t >= pos of cos(q_t, k_pos)."""
    qk_norm_product: Float[Tensor, "layer head pos"]
    """Mean over prompts and queries t >= pos of |q_t| |k_pos|."""
    config: AttentionSinkConfig = field(default_factory=AttentionSinkConfig)

    def is_sink(self) -> Tensor:
        """``[batch layer head]``: the score at the judged position is above the threshold."""
        return self.score[..., self.config.position] > self.config.bound

    def sink_rate(self, pos: int | None = None) -> float:
        """Share of (prompt, layer, head) triples whose sink is at ``pos``, in [0, 1]."""
        pos = self.config.position if pos is None else pos
        return (self.score[..., pos] > self.config.bound).float().mean().item()

    def sink_heads(self) -> list[tuple[int, int]]:
        """(layer, head) pairs that sink at the judged position on every prompt."""
        return [(layer, head) for layer, head in self.is_sink().all(dim=0).nonzero().tolist()]

    def metrics(self) -> dict[str, float]:
        """The headline numbers; see the module's docstring."""
        pos, n_pos = self.config.position, self.score.shape[-1]
        found = {
            "sink_rate": self.sink_rate(),
            "mean_score": self.score[..., pos].mean().item(),
            "value_drain": value_drain(self.ov_norm, pos),
            "resid_peak_ratio": peak_ratio(self.resid_norm, pos).max().item(),
            "n_prompts": float(self.score.shape[0]),
            "n_pos": float(n_pos),
        }
        if self.config.inputs == "swap":
            found["sink_rate_at_0"] = self.sink_rate(0)
        return found

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a head: how often it sinks, how much it attends, how far its value is drained."""
        pos = self.config.position
        n_layers, n_heads = self.score.shape[1:3]
        layers = torch.arange(n_layers).repeat_interleave(n_heads)
        return {
            "layer": layers.tolist(),
            "head": torch.arange(n_heads).repeat(n_layers).tolist(),
            "sink_rate": self.is_sink().float().mean(dim=0).flatten().tolist(),
            "mean_score": self.score[..., pos].mean(dim=0).flatten().tolist(),
            "ov_norm_ratio": peak_ratio(self.ov_norm, pos).flatten().tolist(),
            "qk_cosine": self.qk_cosine[..., pos].flatten().tolist(),
            "qk_norm_product": self.qk_norm_product[..., pos].flatten().tolist(),
        }


def peak_ratio(norm: Float[Tensor, "... pos"], pos: int) -> Float[Tensor, "..."]:
    """The norm at one position over its mean at all others (NaN entries left out)."""
    others = torch.cat([norm[..., :pos], norm[..., pos + 1 :]], dim=-1)
    return norm[..., pos] / others.nanmean(dim=-1)


def value_drain(ov_norm: Float[Tensor, "layer head pos"], pos: int) -> float:
    """Mean |v W_O| of all heads at one position over its mean elsewhere."""
    return peak_ratio(ov_norm.mean(dim=(0, 1)), pos).item()
