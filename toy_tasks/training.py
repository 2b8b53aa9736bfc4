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
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.settings import check_settings, setting

LossAt = Callable[[nn.Module, int, torch.Generator], Float[Tensor, ""]]
"""Draw the batch of a step (updates done before it) from the generator and return its loss."""

Figures = dict[str, float | int]
"""Named numbers of one step: a line of metrics.jsonl."""

Measure = Callable[[nn.Module], Figures]
"""Figures to be noted at every checkpoint."""


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
    grad_clip: float = setting(1.0, "largest norm of the whole gradient", low=0.0, exclusive=True)
    seed: int = setting(0, "seed of the batches", low=0.0)
    checkpoints_per_doubling: float = setting(
        2.0, "checkpoints kept while the step doubles", low=0.0, exclusive=True
    )
    save_every: int = setting(250, "steps between two writings of the file to resume from", low=1.0)
    report_every: int = setting(100, "steps between two lines of metrics", low=1.0)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)


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
    done, losses = _resume(model, optimizer, config, out_dir)
    log = _Log(config, out_dir, done, losses, progress)
    kept = set(checkpoint_steps(config))
    with deferred_interrupt() as interrupted:
        if done == 0:
            _keep(model, 0, out_dir, log, measure)
        while done < config.n_steps:
            log.add(_update(model, optimizer, loss_at, config, done))
            done += 1
            if done in kept:
                _keep(model, done, out_dir, log, measure)
            elif done % config.report_every == 0:
                log.write(done, {})
            if done in kept or done % config.save_every == 0 or interrupted.is_set():
                _save_state(model, optimizer, config, done, log.losses, out_dir)
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
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            f"loss and gradient must stay finite; at step {step} the loss is {loss.item()} and the "
            f"gradient norm {norm.item()}. Earlier checkpoints are kept; train again in a new "
            "folder with a lower lr."
        )
    optimizer.step()
    return loss.item()


def _make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in trained if weight.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    adaptive = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return adaptive(groups, lr=config.lr, betas=(config.beta1, config.beta2))


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


def drop_lines_after(path: Path, step: int) -> None:
    """Forget the figures of steps that will be made again; a torn last line goes too."""
    kept = (
        [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        if step
        else []
    )
    fresh = path.with_suffix(".part")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


def read_metrics(path: Path) -> list[Figures]:
    """Return the lines of a metrics file, also of one that is just being written."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


# Files


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name; a tied weight once."""
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights of a checkpoint."""
    tensors, _ = read_safetensors(path)
    _fill(weights_of(model), tensors, path)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file that is either whole or not there, also when the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, metadata
    )
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file.

    Raises:
        TrainingError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"{path} must be a whole safetensors file; {error}. Remove it, or copy it again."
        ) from error


def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    wrong = sorted(
        name
        for name in targets
        if name not in tensors or tensors[name].shape != targets[name].shape
    )
    if wrong:
        raise TrainingError(
            f"{path} must fit the model; {wrong[0]} does not. Use the settings it was trained with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _save_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    done: int,
    losses: list[float],
    out_dir: Path,
) -> None:
    """Write weights and optimiser state in one file, so that they can never be of two steps."""
    tensors = {f"weight/{name}": weight for name, weight in weights_of(model).items()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
    run = {"step": done, "settings": asdict(config), "losses": losses}
    # one entry only: safetensors writes several in no fixed order, and runs are compared by bytes
    write_safetensors(tensors, out_dir / "resume.safetensors", {"run": json.dumps(run)})


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, out_dir: Path
) -> tuple[int, list[float]]:
    """Take up the run in ``out_dir``; return its updates and the losses not yet reported."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "resume.safetensors"
    if not path.exists():
        return 0, []
    tensors, metadata = read_safetensors(path)
    run = json.loads(metadata["run"])
    _refuse_other_settings(run["settings"], config, run["step"], path)
    _fill({f"weight/{name}": weight for name, weight in weights_of(model).items()}, tensors, path)
    for name, weight in model.named_parameters():
        state = {
            # Adam keeps its count of steps on the CPU, wherever the weights are.
            key.split("/")[0]: value if key.startswith("step/") else value.to(weight.device)
            for key, value in tensors.items()
            if key.split("/", 1)[1] == name
        }
        state.pop("weight")
        if state:
            optimizer.state[weight] = state
    return run["step"], run["losses"]


def _refuse_other_settings(
    saved: dict[str, Any], config: TrainingConfig, done: int, path: Path
) -> None:
    """Allow another schedule as long as no learning rate so far would have been another."""
    free = ("n_steps", "decay_share", "final_lr_share", "save_every", "report_every")
    before = TrainingConfig(**{field.name: saved[field.name] for field in fields(config)})
    changed = [name for name in saved if name not in free and saved[name] != getattr(config, name)]
    if done > config.n_steps or any(
        lr_at(step, before) != lr_at(step, config) for step in range(done)
    ):
        changed.append("n_steps")
    if changed:
        raise TrainingError(
            f"a run is resumed with the settings it began with; {path} was made with "
            f"{changed[0]}={saved[changed[0]]}, not {getattr(config, changed[0])}. "
            "Set it so, or choose another folder."
        )
