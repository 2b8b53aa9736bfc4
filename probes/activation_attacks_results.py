"""What an activation attack found: success curves, their limits, and examples to replay."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.activation_attacks_config import ActivationAttackConfig
from probes.activation_attacks_scaling import Fit, bootstrap, fit, interval, resistance


@dataclass(frozen=True)
class ActivationAttackResult:
    """One model under attack; NaN: not measured, -1: past the end of ids or positions."""

    n_attacked: Int[Tensor, " a"]
    """Attacked positions, each a."""
    t_max: Float[Tensor, " a"]
    """Tokens that are forced in half of the cases; 0: not even one."""
    censored: Bool[Tensor, " a"]
    """The longest target that was tried still succeeded: t_max is a lower bound."""
    success: Float[Tensor, "a t seed"]
    """By the setting ``definition``: share of tokens forced, or 1 if all were."""
    accuracy: Float[Tensor, "a t seed"]
    """Share of target tokens that were forced, whatever the definition."""
    curve_t: Int[Tensor, " t"]
    """Target lengths of ``success``, tokens."""
    n_steps: Float[Tensor, "a t seed"]
    norm_ratio: Float[Tensor, "a t seed"]
    """Norm of the perturbation over that of the residual stream at the attacked positions."""
    generation_agrees: Float[Tensor, "a t seed"]
    """1 where greedy generation equals the target exactly if every target token was the argmax."""
    example_context: Int[Tensor, "a pos"]
    example_positions: Int[Tensor, "a n_attacked"]
    example_target: Int[Tensor, "a t_example"]
    """The longest target that was fully forced; -1 alone: none was."""
    example_perturbation: Float[Tensor, "a n_attacked d_model"]
    """Added to ``resid_pre`` of the layer at the example's positions; 0 past the end."""
    d_vocab: Int[Tensor, ""]
    t_max_tokens: Float[Tensor, " a"] | None = None
    """Of the attack with tokens."""
    success_tokens: Float[Tensor, "a t_tokens seed"] | None = None
    curve_t_tokens: Int[Tensor, " t_tokens"] | None = None
    fraction: Float[Tensor, " fraction"] | None = None
    """Shares of the dimensions, at the largest a."""
    t_max_fraction: Float[Tensor, " fraction"] | None = None
    success_fraction: Float[Tensor, "fraction t_fraction seed"] | None = None
    curve_t_fraction: Int[Tensor, " t_fraction"] | None = None
    config: ActivationAttackConfig = field(default_factory=ActivationAttackConfig)

    @cached_property
    def fit(self) -> Fit:
        """Kappa and exponent of all seeds."""
        return fit(self.n_attacked, self.t_max)

    @cached_property
    def resampled(self) -> list[Fit]:
        """Kappa and exponent of resampled seeds."""
        return bootstrap(self.n_attacked, self.curve_t, self.success)

    @property
    def d_model(self) -> int:
        """Size of the residual stream."""
        return self.example_perturbation.shape[-1]

    def chi(self, kappa: float) -> float:
        """Bits in per bit out at a given kappa."""
        return resistance(kappa, self.d_model, int(self.d_vocab), self.config.bits)

    def metrics(self) -> dict[str, float]:
        """The headline numbers; one that the run cannot tell is left out."""
        low, high = interval([each.kappa for each in self.resampled])
        found = {
            "kappa": self.fit.kappa,
            "kappa_low": low,
            "kappa_high": high,
            "n_seeds": float(self.success.shape[-1]),
            "n_problems": float((~self.success.isnan()).sum()),
            "n_censored": float(self.censored.sum()),
        }
        if self.fit.kappa > 0:
            found["chi"] = self.chi(self.fit.kappa)
        found |= self._exponent()
        if self.t_max_tokens is not None:
            kappa_tokens = fit(self.n_attacked, self.t_max_tokens).kappa
            found["kappa_tokens"] = kappa_tokens
            if kappa_tokens > 0:
                found["chi_tokens"] = 1.0 / kappa_tokens
        if not bool(self.generation_agrees.isnan().all()):
            found["generation_agreement"] = float(self.generation_agrees.nanmean())
        return found

    def _exponent(self) -> dict[str, float]:
        if math.isnan(self.fit.exponent):
            return {}
        low, high = interval([each.exponent for each in self.resampled])
        found = {"exponent": self.fit.exponent}
        return found if math.isnan(low) else found | {"exponent_low": low, "exponent_high": high}

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a tried length of each a: success and cost, means over the seeds."""
        measured = (~self.success.isnan()).any(dim=-1)
        a, t = measured.nonzero().T
        return {
            "n_attacked": self.n_attacked[a].tolist(),
            "t": self.curve_t[t].tolist(),
            "success": self.success.nanmean(dim=-1)[a, t].tolist(),
            "accuracy": self.accuracy.nanmean(dim=-1)[a, t].tolist(),
            "all_correct": (self.accuracy == 1.0).float().mean(dim=-1)[a, t].tolist(),
            "n_steps": self.n_steps.nanmean(dim=-1)[a, t].tolist(),
            "norm_ratio": self.norm_ratio.nanmean(dim=-1)[a, t].tolist(),
            "t_max": self.t_max[a].tolist(),
        }
