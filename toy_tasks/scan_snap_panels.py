"""The sweep of scan-snap: end states over learning rates, seeds and numbers of queries.

A panel is every pair of a learning rate and a ratio, from every seed, with one number of queries;
it runs as one batch (``scan_snap_sweep``). The more slowly the decoder learns beside attention,
the longer attention scans, and the sparser it snaps: the entropy among distinct tokens falls with
eta_Z at a fixed ratio and rises with the ratio eta_Y / eta_Z from about 2 on.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380, Fig. 6, whose settings are the defaults.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toy_tasks.scan_snap_data import ScanSnapConfig
from toy_tasks.scan_snap_sweep import (
    LR_RATIOS,
    LR_Z,
    ScanSnapSweep,
    standard_error,
    sweep_scan_snap,
)
from toy_tasks.training import Progress, TrainingError, read_safetensors, write_safetensors
from workbench.errors import ConfigError
from workbench.registry import toy_task
from workbench.settings import check_settings, setting

ARRAYS = ("entropy", "common_mass", "loss", "diverged_at")
REPORTS = 10
"""Lines of progress in a panel."""


@dataclass(frozen=True)
class ScanSnapSweepConfig:
    """Settings of the panels; lists are written with commas."""

    lr_z: tuple[float, ...] = setting(LR_Z, "learning rates of the attention Z")
    lr_ratio: tuple[float, ...] = setting(
        LR_RATIOS, "learning rates of the decoder Y over those of Z"
    )
    n_queries: tuple[int, ...] = setting((1, 3, 5, 10), "query tokens, one panel each")
    n_seeds: int = setting(10, "runs of each setting", low=1, high=1000)
    seed: int = setting(0, "the first of their seeds", low=0)
    steps: int = setting(100, "updates", low=1)
    batch_size: int = setting(128, "sequences of a step", low=1)
    n_pos: int = setting(128, "tokens of a sequence, the query included", low=2, unit="tokens")
    n_classes_per_query: int = setting(2, "next tokens, that is classes, of a query", low=1)
    n_common: int = setting(10, "contextual tokens that all classes have", low=0)
    n_common_per_query: int = setting(
        0, "contextual tokens that the classes of one query have", low=0
    )
    n_distinct: int = setting(10, "contextual tokens that only one class has", low=1)
    momentum: float = setting(0.9, "share of the last update that is repeated", low=0.0, high=0.999)
    optimizer: str = setting("sgd", "sgd, or adam with momentum as beta1", choices=("sgd", "adam"))
    init: str = setting("uniform", "first weights", choices=("zero", "normal", "uniform"))

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)
        for name in ("lr_z", "lr_ratio", "n_queries"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be distinct numbers, at least one; got {values}")
        for n_queries in self.n_queries:
            for rate in self.lr_z:
                self.panel(n_queries, lr_z=rate)
            for ratio in self.lr_ratio:
                self.panel(n_queries, lr_ratio=ratio)

    def panel(self, n_queries: int, **own: float) -> ScanSnapConfig:
        """The settings that the runs of one panel share."""
        swept = ("lr_z", "lr_ratio", "n_queries", "n_seeds", "seed")
        shared: dict[str, Any] = {
            name: value for name, value in asdict(self).items() if name not in swept
        }
        return ScanSnapConfig(n_queries=n_queries, **{**shared, **own})

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of every setting, the same."""
        return tuple(range(self.seed, self.seed + self.n_seeds))


@dataclass(frozen=True)
class ScanSnapSweepResult:
    """Where every run ended; NaN where it diverged."""

    entropy: Float[Tensor, "panel lr_z lr_ratio seed"]
    """Of attention among distinct tokens, in nats, mean over the classes."""
    common_mass: Float[Tensor, "panel lr_z lr_ratio seed"]
    """Share of attention on common tokens, mean over the classes."""
    loss: Float[Tensor, "panel lr_z lr_ratio seed"]
    """Of the batch after the last update, in nats."""
    diverged_at: Int[Tensor, "panel lr_z lr_ratio seed"]
    """First step of a loss ten times that of guessing; -1: none."""
    labels: dict[str, tuple[str, ...]]
    config: ScanSnapSweepConfig = field(default_factory=ScanSnapSweepConfig)

    def mean_entropy(self) -> Float[Tensor, "panel lr_z lr_ratio"]:
        """Mean over the seeds that did not diverge."""
        return self.entropy.nanmean(dim=-1)

    def entropy_error(self) -> Float[Tensor, "panel lr_z lr_ratio"]:
        """Standard error of that mean."""
        return standard_error(self.entropy)

    def metrics(self) -> dict[str, float]:
        """The ends of the panels, and how often the paper's two orderings hold."""
        entropy = self.mean_entropy()
        from_two = [index for index, ratio in enumerate(self.config.lr_ratio) if ratio >= 2]
        kept = entropy[~entropy.isnan()]
        return {
            "entropy_min": kept.min().item() if len(kept) else torch.nan,
            "entropy_max": kept.max().item() if len(kept) else torch.nan,
            "falls_with_lr_z": _share(entropy.diff(dim=1) < 0),
            "rises_with_lr_ratio": _share(entropy[..., from_two].diff(dim=2) > 0),
            "n_runs": float(self.entropy.numel()),
            "n_diverged": float((self.diverged_at >= 0).sum()),
        }

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a setting."""
        config = self.config
        axes = (config.n_queries, config.lr_z, config.lr_ratio)
        grid = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in axes))
        return {
            "n_queries": grid[:, 0].int().tolist(),
            "lr_z": grid[:, 1].tolist(),
            "lr_ratio": grid[:, 2].tolist(),
            "entropy": self.mean_entropy().flatten().tolist(),
            "entropy_error": self.entropy_error().flatten().tolist(),
            "common_mass": self.common_mass.nanmean(dim=-1).flatten().tolist(),
            "loss": self.loss.nanmean(dim=-1).flatten().tolist(),
            "n_diverged": (self.diverged_at >= 0).sum(dim=-1).flatten().tolist(),
        }


def _share(holds: Tensor) -> float:
    return holds.float().mean().item() if holds.numel() else torch.nan


@toy_task(
    "scan-snap-sweep",
    config=ScanSnapSweepConfig,
    result=ScanSnapSweepResult,
    paper="arXiv:2305.16380",
)
def train_scan_snap_sweep(
    config: ScanSnapSweepConfig,
    out_dir: Path,
    progress: Callable[[Progress], None] | None = None,
) -> ScanSnapSweepResult:
    """Train panels of learning rates, each as one batch, and compare where attention ended.

    Every finished panel is kept in the folder: a sweep that was stopped goes on with the next one.

    Raises:
        TrainingError: The folder holds a sweep of other settings. A run that diverges is marked
            and stops none of the others.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    panels: list[dict[str, Tensor]] = []
    for index, n_queries in enumerate(config.n_queries):
        shown = _Shown(config, index, started, progress)
        panels.append(_panel(config, n_queries, out_dir, shown))
        _note(panels[-1], n_queries, out_dir, fresh=index == 0)
    labels = {
        "panel": tuple(f"n_queries={n_queries}" for n_queries in config.n_queries),
        "lr_z": tuple(f"{rate:g}" for rate in config.lr_z),
        "lr_ratio": tuple(f"{ratio:g}" for ratio in config.lr_ratio),
        "seed": tuple(map(str, config.seeds)),
    }
    stacked = {name: torch.stack([panel[name] for panel in panels]) for name in ARRAYS}
    return ScanSnapSweepResult(**stacked, labels=labels, config=config)


def _panel(
    config: ScanSnapSweepConfig, n_queries: int, out_dir: Path, shown: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Read a panel from the folder, or run it."""
    path = out_dir / f"panel_{n_queries:03d}.safetensors"
    settings = asdict(config.panel(n_queries)) | {
        name: list(getattr(config, name)) for name in ("lr_z", "lr_ratio", "seeds")
    }
    if path.exists():
        tensors, metadata = read_safetensors(path)
        saved = json.loads(metadata["settings"])
        changed = [name for name in settings if saved.get(name) != settings[name]]
        if changed:
            raise TrainingError(
                f"a sweep goes on with the settings it began with; {path} was made with "
                f"{changed[0]}={saved.get(changed[0])}, not {settings[changed[0]]}. Set it so, or "
                "choose another folder."
            )
        return tensors
    found: ScanSnapSweep = sweep_scan_snap(
        config.panel(n_queries),
        config.seeds,
        lr_z=config.lr_z,
        lr_ratios=config.lr_ratio,
        progress=shown,
    )
    tensors = {name: getattr(found, name) for name in ARRAYS}
    write_safetensors(tensors, path, {"settings": json.dumps(settings)})
    return tensors


def _note(panel: dict[str, Tensor], n_queries: int, out_dir: Path, *, fresh: bool) -> None:
    """Write a finished panel's line of metrics.jsonl."""
    line = {
        "step": n_queries,
        "entropy": panel["entropy"].nanmean().item(),
        "n_diverged": int((panel["diverged_at"] >= 0).sum()),
    }
    with (out_dir / "metrics.jsonl").open("w" if fresh else "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class _Shown:
    """Progress of one panel as progress of the sweep; steps of larger panels take longer."""

    def __init__(
        self,
        config: ScanSnapSweepConfig,
        index: int,
        started: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.index, self.started, self.progress = config, index, started, progress

    def __call__(self, step: int, n_steps: int) -> None:
        if self.progress is None or (step % max(1, n_steps // REPORTS) and step < n_steps):
            return
        # Decoder and data both grow with the number of tokens: about a square.
        costs = [self.config.panel(n_queries).n_tokens ** 2 for n_queries in self.config.n_queries]
        done = sum(costs[: self.index]) + costs[self.index] * step / n_steps
        left = (time.monotonic() - self.started) * (sum(costs) / done - 1)
        total = n_steps * len(costs)
        figures = {"n_queries": self.config.n_queries[self.index]}
        self.progress(Progress(self.index * n_steps + step, total, dict(figures), left))
