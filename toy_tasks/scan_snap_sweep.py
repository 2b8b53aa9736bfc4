"""Many scan-snap runs as one: a panel of learning rates, each with the same seeds.

All runs of the panel share a leading axis of the weights, so that a step of the panel is a step
of the toy with larger matrices. Sequences depend on the seed alone: runs of one seed that differ in
learning rates see the same ones, which makes their comparison sharper.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380, Fig. 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toy_tasks.scan_snap_data import Batch, ClassLaw, ScanSnapConfig, class_law, draw_batch
from toy_tasks.scan_snap_dynamics import (
    Ascent,
    Weights,
    ascent,
    class_attention,
    common_mass,
    distinct_entropy,
    first_weights,
    forward,
    mean_loss,
)
from toy_tasks.scan_snap_run import WORST_LOSS
from toy_tasks.training import batch_generator
from workbench.errors import ConfigError

LR_Z = (0.5, 1.0, 2.0, 3.0)
LR_RATIOS = (1.0, 2.0, 5.0, 10.0)
"""The paper's panel."""


@dataclass(frozen=True)
class ScanSnapSweep:
    """Where each run of a panel ended."""

    lr_z: tuple[float, ...]
    lr_ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    entropy: Float[Tensor, "lr_z lr_ratio seed"]
    """Of attention among distinct tokens, in nats, mean over the classes; lower is sparser."""
    common_mass: Float[Tensor, "lr_z lr_ratio seed"]
    """Share of attention on common tokens, mean over the classes, in [0, 1]."""
    loss: Float[Tensor, "lr_z lr_ratio seed"]
    """Of the batch after the last update, in nats."""
    diverged_at: Int[Tensor, "lr_z lr_ratio seed"]
    """First step whose loss was ten times that of guessing, or no number; -1: none. The other
    numbers of such a run are NaN; it stops none of the others."""

    def mean_entropy(self) -> Float[Tensor, "lr_z lr_ratio"]:
        """Mean over the seeds that did not diverge."""
        return self.entropy.nanmean(dim=-1)

    def table(self) -> dict[str, list[float]]:
        """One row a setting: mean and standard error of the entropy, means of the rest."""
        grid = torch.cartesian_prod(torch.tensor(self.lr_z), torch.tensor(self.lr_ratios))
        return {
            "lr_z": grid[:, 0].tolist(),
            "lr_ratio": grid[:, 1].tolist(),
            "entropy": self.mean_entropy().flatten().tolist(),
            "entropy_error": standard_error(self.entropy).flatten().tolist(),
            "common_mass": self.common_mass.nanmean(dim=-1).flatten().tolist(),
            "loss": self.loss.nanmean(dim=-1).flatten().tolist(),
        }


def sweep_scan_snap(
    config: ScanSnapConfig,
    seeds: tuple[int, ...],
    *,
    lr_z: tuple[float, ...] = LR_Z,
    lr_ratios: tuple[float, ...] = LR_RATIOS,
    progress: Callable[[int, int], None] | None = None,
) -> ScanSnapSweep:
    """Train the panel; ``lr_z``, ``lr_ratio`` and ``seed`` of the config are not used.

    Weights are float32: the entropies differ from those of single runs, which are float64, by
    less than 1e-4.

    Raises:
        ConfigError: no seed or no learning rate.
    """
    panel = _settings(config, lr_z, lr_ratios, seeds)
    law = class_law(config)
    n_settings = len(panel) // len(seeds)
    weights = _repeated([first_weights(config, seed, torch.float32) for seed in seeds], n_settings)
    rates = (
        torch.tensor([run.lr_z * run.lr_ratio for run in panel]),
        torch.tensor([run.lr_z for run in panel]),
    )
    climb = Ascent(config.optimizer, rates, config.momentum)
    moments = climb.start(weights)
    diverged_at = torch.full((len(panel),), -1)
    for step in range(config.steps + 1):
        batch = _panel_batch(law, config, seeds, step, n_settings)
        attended = forward(weights, batch)
        loss = mean_loss(attended, batch)
        wild = ~(loss <= WORST_LOSS * math.log(config.n_tokens)) & (diverged_at < 0)
        diverged_at[wild] = step
        if step < config.steps:
            climb.step(weights, moments, ascent(weights, batch, attended), step)
        if progress and step:
            progress(step, config.steps)
    c = class_attention(weights.Z, law)
    entropy, mass = (found(c, law).mean(dim=1) for found in (distinct_entropy, common_mass))
    ended = [
        values.float().masked_fill(diverged_at >= 0, torch.nan) for values in (entropy, mass, loss)
    ]
    shape = (len(seeds), len(lr_z), len(lr_ratios))
    found = (values.view(shape).permute(1, 2, 0).contiguous() for values in (*ended, diverged_at))
    return ScanSnapSweep(lr_z, lr_ratios, seeds, *found)


def standard_error(values: Float[Tensor, "*panel seed"]) -> Float[Tensor, "*panel"]:
    """Of the mean over the seeds that are no NaN; 0 where there is one seed only."""
    n = (~values.isnan()).sum(dim=-1)
    away = (values - values.nanmean(dim=-1, keepdim=True)).square().nansum(dim=-1)
    return (away / (n - 1).clamp(min=1) / n.clamp(min=1)).sqrt()


def _settings(
    config: ScanSnapConfig,
    lr_z: tuple[float, ...],
    lr_ratios: tuple[float, ...],
    seeds: tuple[int, ...],
) -> list[ScanSnapConfig]:
    """One checked config a run: seeds outermost, ratios innermost."""
    if not (lr_z and lr_ratios and seeds):
        raise ConfigError(
            "a sweep needs at least one lr_z, one lr_ratio and one seed; got "
            f"{len(lr_z)}, {len(lr_ratios)} and {len(seeds)}"
        )
    return [
        replace(config, lr_z=rate, lr_ratio=ratio, seed=seed)
        for seed in seeds
        for rate in lr_z
        for ratio in lr_ratios
    ]


def _repeated(of_seeds: list[Weights], n_settings: int) -> Weights:
    return Weights(
        *(
            torch.cat(matrices).repeat_interleave(n_settings, dim=0)
            for matrices in zip(*of_seeds, strict=True)
        )
    )


def _panel_batch(
    law: ClassLaw, config: ScanSnapConfig, seeds: tuple[int, ...], step: int, n_settings: int
) -> Batch:
    generators = [batch_generator(seed, step) for seed in seeds]
    drawn = draw_batch(law, (config.batch_size, config.n_pos - 1), generators)
    drawn = drawn._replace(counts=drawn.counts.float())
    return Batch(*(part.repeat_interleave(n_settings, dim=0) for part in drawn))
