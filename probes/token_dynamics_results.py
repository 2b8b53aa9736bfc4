"""Settings and results of the token-dynamics probe: one result type a mode.

Papers: Singh 2023, arXiv:2308.10874 (walk); Vo et al. 2025, arXiv:2410.03292 (state-space).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.token_dynamics_lens import named_lens
from workbench.settings import check_settings, setting

REGIMES = ("convergent", "mixed", "divergent")
"""By code + 1."""
VIEWS = ("raw", "centred", "after the final norm")

# Settings


@dataclass(frozen=True)
class TokenDynamicsConfig:
    """What is measured: the walk of a transformer, or the weights of a state-space model."""

    mode: str = setting(
        "walk",
        "walk: the path of the residual stream (attention models); state-space: the weights of a Mamba",
        choices=("walk", "state-space"),
    )
    baseline: str = setting(
        "uniform",
        "what attention is compared with: uniform over the prefix, or over the prefix without BOS",
        choices=("uniform", "uniform-no-bos"),
    )
    queries: tuple[int, ...] = setting(
        (-1,),
        "positions whose attention is split by source token; below 0: from each prompt's end",
        unit="tokens",
    )
    new_tokens: int = setting(
        8, "generated tokens of the decoding path; 0: none", low=0, unit="tokens"
    )
    tuned_lens: str = setting(
        "", "folder of a tuned lens (config.json, params.safetensors or params.pt); empty: none"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        # The key of a result must follow the lens' numbers, not the place where it lies.
        object.__setattr__(self, "tuned_lens", named_lens(self.tuned_lens))


# Results


@dataclass(frozen=True, kw_only=True)
class TokenDynamicsResult:
    """What the two modes have in common; see ``WalkResult`` and ``StateSpaceResult``."""

    config: TokenDynamicsConfig = field(default_factory=TokenDynamicsConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def kind_of(config: TokenDynamicsConfig) -> type["TokenDynamicsResult"]:
        """The result type of a mode."""
        return WalkResult if config.mode == "walk" else StateSpaceResult

    def metrics(self) -> dict[str, float]:
        """The headline numbers."""
        raise NotImplementedError

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a layer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WalkResult(TokenDynamicsResult):
    """Walks of all positions of all prompts; NaN past a prompt's end.

    Steps: attention of block 0, MLP of block 0, attention of block 1, ...; waypoint i lies before
    step i. Means and medians leave position 0 out, whose norm is often 100 times the others'.
    """

    step_norm: Float[Tensor, "batch pos step"]
    """|s_i|, model units."""
    waypoint_norm: Float[Tensor, "batch pos waypoint"]
    """|r_i|, model units."""
    waypoint_cosine: Float[Tensor, "batch pos waypoint"]
    """cos(r_i, last waypoint)."""
    entry_cosine: Float[Tensor, "batch pos waypoint"]
    """cos(r_i, r_0)."""
    turning_cosine: Float[Tensor, "batch pos turn"]
    """cos(s_i, s_{i+1})."""
    radial_cosine: Float[Tensor, "batch pos step"]
    """cos(s_i, r_i): 1 stretches, -1 shrinks, 0 turns."""
    straightness_by_view: Float[Tensor, "view batch pos"]
    """|displacement| / path length, in [0, 1]: raw, centred by the prompt's mean over tokens, and
    after the final norm; 1 for a path of length 0."""
    view_cosine: Float[Tensor, "view batch waypoint"]
    """Mean over positions of cos(r_i, last waypoint) in each view."""
    view_turning: Float[Tensor, "view batch turn"]
    """Mean over positions of cos(s_i, s_{i+1}) in each view."""
    turning_null: Float[Tensor, "batch turn"]
    """The same for the raw steps in an order drawn at random; the random scale is 1/sqrt(d)."""
    pair_cosine: Float[Tensor, "batch waypoint"]
    """Anisotropy: mean cosine of the waypoints of two different tokens of a prompt."""
    arrival: Float[Tensor, "batch pos"]
    """The first waypoint from which the model's final argmax stays first in the logit lens."""
    lens_kl: Float[Tensor, "batch waypoint"]
    """KL(final || logit lens), nats, mean over positions."""
    lens_agreement: Float[Tensor, "batch waypoint"]
    """Share of positions whose logit lens has the final argmax first."""
    tuned_kl: Float[Tensor, "batch layer"] | None
    """KL(final || tuned lens) at the entry of each block; None: no lens was given."""
    association_bias: Float[Tensor, "batch layer"]
    """|attn_out - attn_out under the baseline| / |attn_out| at the same input, mean over positions."""
    entropy_gap: Float[Tensor, "batch layer"]
    """ln(pos + 1) - entropy of the attention, nats, mean over heads and positions."""
    kl_uniform: Float[Tensor, " batch"]
    """KL(full || attention replaced by the baseline everywhere), nats, mean over positions."""
    kl_zero: Float[Tensor, " batch"]
    """The same with every head silenced."""
    kl_parameterless: Float[Tensor, " batch"]
    """The same for softmax(E E^T) E W_U, attention without any parameter."""
    agreement_uniform: Float[Tensor, " batch"]
    """Share of positions whose argmax survives the baseline."""
    loss: Float[Tensor, "batch model"]
    """Next-token loss, nats: full, baseline, silenced."""
    attribution_norm: Float[Tensor, "batch query layer k_pos"]
    """Length of what each source token writes at the chosen queries, all heads together."""
    attribution_share: Float[Tensor, "batch query layer k_pos"]
    """Its share of attn_out, <a, attn_out> / |attn_out|^2; shares and the rest sum to 1."""
    attribution_rest: Float[Tensor, "batch query layer"]
    """Share of attn_out that comes from no token: the output bias, learned sinks."""
    telescoping_error: Float[Tensor, " batch"]
    """|r_0 + sum of steps - resid_post of the last block| / |the latter|, largest over positions."""
    decoding_step: Float[Tensor, "batch gap"] | None
    """|c_{T+1} - c_T| over generated tokens, c after the final norm; None: none were generated."""
    decoding_turning: Float[Tensor, "batch bend"] | None
    """Turning cosines of that path."""
    decoding_straightness: Float[Tensor, " batch"] | None
    proximity: Float[Tensor, "batch new"] | None
    """Correlation over the vocabulary of cos(c_T, W_U[:, t]) and log p(t)."""
    chosen_cosine: Float[Tensor, "batch new"] | None
    """cos(c_T, W_U of the token that was generated)."""

    def inside(self) -> Tensor:
        """``[batch pos]``: real tokens but the first of each prompt."""
        real = ~self.arrival.isnan()
        return real & (torch.arange(real.shape[1]) > 0)

    def aggregate_shares(self) -> Float[Tensor, "batch pos"]:
        """Share of the path's length that attention walks; 0 for a path of length 0."""
        length = self.step_norm.sum(dim=-1)
        share = self.step_norm[..., ::2].sum(dim=-1) / length
        return torch.where(length == 0, 0.0, share)

    def redundancy(self) -> float:
        """1 - KL(full || baseline) / KL(full || silenced); 1 where silencing changes nothing."""
        zero = self.kl_zero.double().mean()
        return 1.0 if zero < 1e-12 else float(1 - self.kl_uniform.double().mean() / zero)

    def metrics(self) -> dict[str, float]:
        """The headline numbers; medians and means over tokens after the first."""
        inside = self.inside()
        straight = [view[inside].median().item() for view in self.straightness_by_view]
        loss = self.loss.mean(dim=0)
        found = {
            "straightness": straight[0],
            "aggregate_share": self.aggregate_shares()[inside].median().item(),
            "redundancy": self.redundancy(),
            "straightness_centred": straight[1],
            "straightness_normed": straight[2],
            "turning_cosine": self.turning_cosine[inside].mean().item(),
            "turning_cosine_null": self.turning_null.mean().item(),
            "arrival_share": self.arrival[inside].mean().item() / self.step_norm.shape[-1],
            "association_bias": self.association_bias.mean().item(),
            "entropy_gap": self.entropy_gap.mean().item(),
            "agreement_uniform": self.agreement_uniform.mean().item(),
            "loss": loss[0].item(),
            "loss_uniform": loss[1].item(),
            "loss_zero": loss[2].item(),
            "telescoping_error": self.telescoping_error.max().item(),
            "n_prompts": float(self.step_norm.shape[0]),
            "n_pos": float(self.step_norm.shape[1]),
        }
        if self.proximity is not None:
            found["proximity"] = self.proximity.nanmean().item()
        return found

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a block: its two steps, where the lens stands after it, its association bias."""
        inside = self.inside()
        median = self.step_norm[inside].median(dim=0).values
        relative = (self.step_norm / self.waypoint_norm[..., :-1])[inside].median(dim=0).values
        radial = self.radial_cosine[inside].mean(dim=0)
        return {
            "layer": list(range(len(median) // 2)),
            "attention_step": median[::2].tolist(),
            "mlp_step": median[1::2].tolist(),
            "attention_relative_step": relative[::2].tolist(),
            "mlp_relative_step": relative[1::2].tolist(),
            "attention_radial": radial[::2].tolist(),
            "mlp_radial": radial[1::2].tolist(),
            "lens_agreement": self.lens_agreement.mean(dim=0)[2::2].tolist(),
            "lens_kl": self.lens_kl.mean(dim=0)[2::2].tolist(),
            "association_bias": self.association_bias.mean(dim=0).tolist(),
            "entropy_gap": self.entropy_gap.mean(dim=0).tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class StateSpaceResult(TokenDynamicsResult):
    """Weights of every selective state-space layer, read through the theory's matrices."""

    eigenvalues: Float[Tensor, "layer d_state part"]
    """Of S_B S_C^T, sorted by real part, smallest first; parts: real, imaginary. Mamba-2 with
    several groups: those of all groups, sorted together."""
    n_positive: Int[Tensor, " layer"]
    """Eigenvalues with a positive real part."""
    n_negative: Int[Tensor, " layer"]
    regime: Int[Tensor, " layer"]
    """-1 convergent, 0 mixed, 1 divergent; in words in ``labels["regime"]``."""
    symmetric_positive: Int[Tensor, " layer"]
    """Inertia of the symmetric part (M + M^T)/2 of M = S_C^T S_B."""
    symmetric_negative: Int[Tensor, " layer"]
    delta_norm: Float[Tensor, " layer"]
    """Frobenius norm of S_Delta, without its bias."""
    decay: Float[Tensor, "layer bound"]
    """Smallest, mean and largest a = exp(A_log) over channels and states."""

    def share(self, code: int) -> float:
        """Share of layers in a regime, in [0, 1]."""
        return (self.regime == code).float().mean().item()

    def metrics(self) -> dict[str, float]:
        """The headline numbers."""
        n_layers, n_states = self.eigenvalues.shape[:2]
        return {
            "share_convergent": self.share(-1),
            "share_divergent": self.share(1),
            "share_mixed": self.share(0),
            "positive_eigenvalues": self.n_positive.sum().item() / (n_layers * n_states),
            "negative_eigenvalues": self.n_negative.sum().item() / (n_layers * n_states),
            "n_layers": float(n_layers),
            "d_state": float(n_states),
        }

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a layer."""
        real = self.eigenvalues[..., 0]
        return {
            "layer": list(range(len(real))),
            "regime": self.regime.tolist(),
            "n_positive": self.n_positive.tolist(),
            "n_negative": self.n_negative.tolist(),
            "smallest_real_part": real[:, 0].tolist(),
            "largest_real_part": real[:, -1].tolist(),
            "symmetric_positive": self.symmetric_positive.tolist(),
            "symmetric_negative": self.symmetric_negative.tolist(),
            "delta_norm": self.delta_norm.tolist(),
            "mean_decay": self.decay[:, 1].tolist(),
        }
