"""Settings of the training loop, and what follows from them: learning rates, steps, randomness."""

import math
from dataclasses import dataclass

import torch

from workbench.errors import WorkbenchError
from workbench.settings import check_settings, setting


class TrainingError(WorkbenchError):
    """A training run that cannot start, go on or be resumed."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the loop; what the task needs beyond them is the task's own."""

    n_steps: int = setting(1000, "updates", low=1.0)
    lr: float = setting(1e-3, "learning rate between warm-up and decay", low=0.0, exclusive=True)
    warmup_steps: int = setting(100, "steps over which the learning rate rises", low=0.0)
    decay_share: float = setting(
        0.25, "share of the steps, at the end, over which it falls", low=0.0, high=1.0
    )
    final_lr_share: float = setting(0.1, "last learning rate, as a share of lr", low=0.0, high=1.0)
    optimizer: str = setting("adamw", "method of descent", choices=("adamw", "adam", "sgd"))
    beta1: float = setting(0.9, "momentum, of either method", low=0.0, high=1.0)
    beta2: float = setting(0.99, "memory of the squared gradient (adamw, adam)", low=0.0, high=1.0)
    weight_decay: float = setting(
        0.1, "pull to zero of matrices; gains and biases are free", low=0.0
    )
    grad_clip: float = setting(
        1.0, "largest norm of the whole gradient; inf: none", low=0.0, exclusive=True
    )
    seed: int = setting(0, "seed of the batches", low=0.0)
    checkpoints_per_doubling: float = setting(
        2.0, "checkpoints kept while the step doubles", low=0.0, exclusive=True
    )
    save_every: int = setting(250, "steps between two writings of the file to resume from", low=1.0)
    report_every: int = setting(100, "steps between two lines of metrics", low=1.0)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)


# Schedules


def lr_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of update number ``step``, counted from 0."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay_steps = config.decay_share * config.n_steps
    left = config.n_steps - step
    if left >= decay_steps:
        return config.lr * warm
    return (
        config.lr
        * warm
        * (config.final_lr_share + (1 - config.final_lr_share) * left / decay_steps)
    )


def checkpoint_steps(config: TrainingConfig) -> list[int]:
    """Return after how many updates weights are kept: 0, a log scale, the end."""
    n_powers = math.floor(math.log2(config.n_steps) * config.checkpoints_per_doubling)
    powers = {
        round(2 ** (power / config.checkpoints_per_doubling)) for power in range(n_powers + 1)
    }
    return sorted({0, *powers, config.n_steps})


def batch_generator(seed: int, step: int) -> torch.Generator:
    """Return the source of randomness of one step, the same however often the run was resumed."""
    return torch.Generator().manual_seed(seed * 1_000_000_007 + step)
