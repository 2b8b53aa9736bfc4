"""The training loop shared by the toy tasks: seeded, resumable, kept in safetensors.

The loop knows nothing of what it trains. The task hands over a model and a function
``loss_at(model, step, generator)`` that draws a batch from the generator and returns the loss. The
generator is seeded by (seed, step), so that a run resumed at step s draws the batch the
uninterrupted run would have drawn, and ends with the same bits on the same machine.

A run lives in one folder:

    checkpoints/step_00000128.safetensors   weights, at steps spaced evenly on a log scale
    resume.safetensors                      weights, optimiser state, step and settings
    metrics.jsonl                           one JSON object a line, readable while it runs

The learning rate rises linearly, stays, and falls linearly over the last ``decay_share`` of the
steps ("warm-up, stable, decay": Hu et al. 2024, arXiv:2404.06395). Before the fall has begun it
does not depend on the length of the run, so a running job can still be lengthened or shortened.
"""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toy_tasks.training_config import (
    TrainingConfig,
    TrainingError,
    batch_generator,
    checkpoint_steps,
    lr_at,
)
from toy_tasks.training_files import (
    Figures,
    drop_lines_after,
    load_weights,
    read_metrics,
    read_safetensors,
    resume,
    save_state,
    weights_of,
    write_safetensors,
)

__all__ = [
    "Figures",
    "LossAt",
    "Measure",
    "Progress",
    "TrainingConfig",
    "TrainingError",
    "batch_generator",
    "checkpoint_steps",
    "deferred_interrupt",
    "drop_lines_after",
    "load_weights",
    "lr_at",
    "read_metrics",
    "read_safetensors",
    "report_to_stderr",
    "train",
    "weights_of",
    "write_safetensors",
]

LossAt = Callable[[nn.Module, int, torch.Generator], Float[Tensor, ""]]
"""Draw the batch of a step (updates done before it) from the generator and return its loss."""

Measure = Callable[[nn.Module], Figures]
"""Figures to be noted at every checkpoint."""


TRY_AGAIN = "Earlier checkpoints are kept; train again in a new folder with a lower lr."


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it."""

    step: int
    n_steps: int
    figures: Figures
    seconds_left: float


def report_to_stderr(progress: Progress) -> None:
    """Write one line of progress, with the time left."""
    figures = "  ".join(
        f"{name} {value:.4g}" for name, value in progress.figures.items() if name != "step"
    )
    left = f"{progress.seconds_left / 60:.1f} min left"
    sys.stderr.write(f"step {progress.step}/{progress.n_steps}  {figures}  {left}\n")
    sys.stderr.flush()


# The loop


def train(
    model: nn.Module,
    loss_at: LossAt,
    config: TrainingConfig,
    out_dir: Path,
    *,
    measure: Measure | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train ``model`` in place, going on from what ``out_dir`` holds.

    Raises:
        TrainingError: the loss or the gradient is no longer finite, or the folder holds a run of
            other settings. Checkpoints and metrics written before stay.
        KeyboardInterrupt: after Ctrl-C, once the step in hand is finished and saved.
    """
    optimizer = _make_optimizer(model, config)
    done, losses = resume(model, optimizer, config, out_dir)
    log = _Log(config, out_dir, done, losses, progress)
    kept = set(checkpoint_steps(config))
    with deferred_interrupt() as interrupted:
        if done == 0:
            _keep(model, 0, out_dir, log, measure)
        while done < config.n_steps:
            log.add(_update(model, optimizer, loss_at, config, done))
            done += 1
            saved = done in kept or done % config.save_every == 0 or interrupted.is_set()
            if saved:
                _refuse_broken(model, done)
            if done in kept:
                _keep(model, done, out_dir, log, measure)
            elif done % config.report_every == 0:
                log.write(done, {})
            if saved:
                save_state(model, optimizer, config, done, log.losses, out_dir)
            if interrupted.is_set():
                raise KeyboardInterrupt


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: LossAt,
    config: TrainingConfig,
    step: int,
) -> float:
    """Make one update and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.zero_grad()
    loss = loss_at(model, step, batch_generator(config.seed, step))
    loss.backward()
    value, norm = loss.item(), 0.0
    if math.isfinite(config.grad_clip):
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise TrainingError(
            f"loss and gradient must stay finite; at step {step} the loss is {value} and the "
            f"gradient norm {norm}. {TRY_AGAIN}"
        )
    optimizer.step()
    return value


def _refuse_broken(model: nn.Module, step: int) -> None:
    """Nothing is saved after an infinite gradient, which no clipping has met and no loss yet shows."""
    for name, weight in weights_of(model).items():
        if not weight.isfinite().all():
            raise TrainingError(
                f"weights must stay finite; after step {step} {name} is not. {TRY_AGAIN}"
            )


def _make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in trained if weight.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel for all weights. On CUDA, torch's own choice: there the fused one keeps its count of
    # steps on the device, where the file to resume from has it on the CPU.
    fused = True if all(weight.device.type == "cpu" for weight in trained) else None
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1, fused=fused)
    adaptive = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return adaptive(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def _keep(model: nn.Module, step: int, out_dir: Path, log: "_Log", measure: Measure | None) -> None:
    """Write the weights of a scheduled step, and its figures."""
    write_safetensors(
        weights_of(model),
        out_dir / "checkpoints" / f"step_{step:08d}.safetensors",
        {"step": str(step)},
    )
    log.write(step, measure(model) if measure else {})


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Note Ctrl-C instead of raising it: half an update must never be saved."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python delivers signals to the main thread only
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class _Log:
    """metrics.jsonl, and the mean loss since its last line."""

    def __init__(
        self,
        config: TrainingConfig,
        out_dir: Path,
        done: int,
        losses: list[float],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.progress = config, progress
        self.path = out_dir / "metrics.jsonl"
        self.losses = losses
        self.started, self.started_at_step = time.monotonic(), done
        drop_lines_after(self.path, done)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def write(self, step: int, measured: Figures) -> None:
        figures: Figures = {"step": step, "lr": lr_at(max(step - 1, 0), self.config)}
        if self.losses:
            figures["loss"] = sum(self.losses) / len(self.losses)
        figures |= measured
        self.losses = []
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        if self.progress:
            self.progress(Progress(step, self.config.n_steps, figures, self._seconds_left(step)))

    def _seconds_left(self, step: int) -> float:
        rate = (time.monotonic() - self.started) / max(step - self.started_at_step, 1)
        return rate * (self.config.n_steps - step)
