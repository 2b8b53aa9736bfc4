"""ZeroTuning's profile: what more attention to the first token does through each head alone.

A head is up-effective when it helps and down-effective when it hurts. ``finite`` runs every head under
``probe_gamma``, on a pass that begins at its block. ``gradient`` takes all heads from one backward pass
and runs only the strongest under ``probe_gamma``: those that do not do what the gradient said are left
out. Where there are gradients both are made, and their rank correlation is reported. Card: zerotuning
section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.calibration.effects import Answers, Work
from workbench.calibration.gradient import gradient_profile
from workbench.calibration.prepared import prepare
from workbench.calibration.settings import Run, ZeroTuningCalibration
from workbench.errors import ConfigError
from workbench.evaluation.scoring import Encoded
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter

Heads = tuple[tuple[int, int], ...]

MARGIN_WEIGHT = 1e-4
"""Weight of the squashed margin beside a right answer: it orders ties and never outweighs one answer of
ten thousand."""


@dataclass(frozen=True)
class Profile:
    """Effects of single heads, and the heads that were taken."""

    is_up: bool
    """Whether up-effective heads are the more."""
    heads: Heads
    """The strongest of the dominant type."""
    measured: Heads
    """Heads that were run under the probe."""
    effect: Float[Tensor, " measured"]
    """Change of the objective under the probe; above 0: up-effective."""
    gradient: Float[Tensor, "layer head"] | None
    """Derivative of the objective in log gamma; None: the backend or mode has none."""

    def document(self) -> dict[str, Any]:
        """For the result's file; without a rank correlation where there is none."""
        found: dict[str, Any] = {
            "dominant": "up" if self.is_up else "down",
            "profile": _by_head(self.measured, self.effect),
        }
        if self.gradient is not None:
            found["gradient"] = _by_head(_all_heads(*self.gradient.shape), self.gradient.flatten())
            beside = [float(self.gradient[head]) for head in self.measured]
            correlation = rank_correlation(torch.tensor(beside), self.effect)
            if correlation is not None:
                found["gradient_rank_correlation"] = correlation
        return found


def profile_heads(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    config: ZeroTuningCalibration,
    run: Run,
    work: Work,
) -> Profile:
    """Measure the heads and take those of the dominant type.

    Raises:
        ConfigError: ``profile=gradient`` where there are no gradients.
    """
    proxy = None
    if "gradients" in model.capabilities and config.mode == "score":
        proxy = gradient_profile(model, questions, config.objective, run.batch_size, work)
    if config.profile == "finite":
        n_layers, n_heads = model.spec.n_layers, model.spec.n_heads
        every = _all_heads(n_layers, n_heads)
        effect = finite_profile(model, questions, every, config, run, work)
        is_up, heads = dominant_heads(effect.view(n_layers, n_heads), config.share)
        return Profile(is_up, heads, every, effect, proxy)
    if proxy is None:
        raise ConfigError(
            f"profile=gradient needs mode=score and a backend with gradients (hf); {model.backend} "
            f"and mode={config.mode} were given; use profile=finite"
        )
    is_up, strongest = dominant_heads(proxy, config.share)
    effect = finite_profile(model, questions, strongest, config, run, work)
    signed = (effect if is_up else -effect).tolist()
    verified = tuple(head for head, value in zip(strongest, signed, strict=True) if value > 0)
    return Profile(is_up, verified, strongest, effect, proxy)


def finite_profile(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    heads: Heads,
    config: ZeroTuningCalibration,
    run: Run,
    work: Work,
) -> Float[Tensor, " measured"]:
    """Change of the objective under ``probe_gamma`` on each head alone; above 0: up-effective."""
    change = torch.zeros(len(heads), dtype=torch.float64)
    for start in range(0, len(questions), run.batch_size):
        batch = questions[start : start + run.batch_size]
        part = run.piece(
            f"profile-heads-{start}",
            partial(_batch_profile, model, batch, heads, config, run.batch_size),
        )
        before = Answers(part["stock_margin"], part["stock_entropy"])
        after = Answers(part["margin"], part["entropy"])
        difference = _values(after, config.objective) - _values(before, config.objective)
        change += difference.double().sum(dim=-1)
        work.layer_forwards += float(part["work"])
        run.progress(start + len(batch), len(questions))
    sign = 1.0 if config.probe_gamma > 1.0 else -1.0
    return (sign * change / len(questions)).float()


def _values(answers: Answers, objective: str) -> Tensor:
    """What is averaged over questions: larger is better."""
    if objective == "entropy":
        return -answers.entropy
    return (answers.margin > 0).float() + MARGIN_WEIGHT * torch.tanh(answers.margin)


def _batch_profile(
    model: ModelAdapter,
    batch: Sequence[Encoded],
    heads: Heads,
    config: ZeroTuningCalibration,
    batch_size: int,
) -> dict[str, Tensor]:
    """Margin and entropy ``[head question]`` with each head alone under the probe, and without."""
    work, layers = Work(), sorted({layer for layer, _ in heads})
    intervention = ZeroTuning(config.probe_gamma, mode=config.mode)
    prepared = prepare(model, batch, intervention, layers, work)
    stock = prepared.stock
    margin, entropy = stock.margin.repeat(len(heads), 1), stock.entropy.repeat(len(heads), 1)
    for layer in layers:
        here = [place for place, head in enumerate(heads) if head[0] == layer]
        rows = [
            (question, place)
            for place in here
            for question in range(len(batch))
            if prepared.touched[layer, question, heads[place][1]]
        ]
        if rows:
            pairs = [(question, heads[place][1]) for question, place in rows]
            found = prepared.rows.answers(layer, pairs, batch_size, work)
            question, place = torch.tensor(rows).T
            margin[place, question], entropy[place, question] = found.margin, found.entropy
    return {
        "margin": margin,
        "entropy": entropy,
        "stock_margin": stock.margin,
        "stock_entropy": stock.entropy,
        "work": torch.tensor(work.layer_forwards, dtype=torch.float64),
    }


def dominant_heads(effect: Float[Tensor, "layer head"], share: float) -> tuple[bool, Heads]:
    """Whether up-effective heads are the more, and the strongest of the dominant type."""
    is_up = int((effect > 0).sum()) >= int((effect < 0).sum())
    signed = effect if is_up else -effect
    n_taken = min(round(share * effect.numel()), int((signed > 0).sum()))
    order = signed.flatten().argsort(descending=True, stable=True)[:n_taken].tolist()
    return is_up, tuple(sorted(divmod(index, effect.shape[1]) for index in order))


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float | None:
    """Spearman's correlation; None where it is not defined, because one of them does not vary."""
    from scipy.stats import spearmanr

    if len(a.unique()) < 2 or len(b.unique()) < 2:
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _all_heads(n_layers: int, n_heads: int) -> Heads:
    return tuple((layer, head) for layer in range(n_layers) for head in range(n_heads))


def _by_head(heads: Heads, values: Tensor) -> dict[str, float]:
    """With six digits, by ``L3H7``."""
    named = zip(heads, values.tolist(), strict=True)
    return {f"L{layer}H{head}": float(f"{value:.6g}") for (layer, head), value in named}
