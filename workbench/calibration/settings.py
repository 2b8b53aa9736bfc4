"""What a calibration is told, and what it gives."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from workbench.errors import ConfigError
from workbench.interventions.files import VERSION
from workbench.models.base import ModelSpec
from workbench.settings import check_settings, setting

Piece = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def _compute(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return compute()


@dataclass(frozen=True)
class Run:
    """Batch size, seed, progress and kept parts of one calibration."""

    batch_size: int = 16
    seed: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None
    piece: Piece = field(default=_compute)
    """See ``workbench.context.Context.piece``."""


@dataclass(frozen=True)
class ZeroTuningCalibration:
    """How ZeroTuning's heads and gamma are chosen; card zerotuning section 3."""

    objective: str = setting(
        "accuracy",
        "accuracy (supervised) or entropy (unsupervised)",
        choices=("accuracy", "entropy"),
    )
    mode: str = setting("score", "what gamma scales", choices=("score", "key"))
    profile: str = setting(
        "finite",
        "how heads are profiled: by a finite gamma, or one backward pass",
        choices=("finite", "gradient"),
    )
    probe_gamma: float = setting(2.0, "gamma that profiles one head", low=0.0, exclusive=True)
    share: float = setting(0.4, "largest share of all heads to take", low=0.0, high=1.0)
    gammas: tuple[float, ...] = setting(
        (0.25, 0.5, 0.75, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), "gammas to choose from"
    )

    shares: ClassVar[tuple[float, float]] = (0.5, 0.25)
    """Of the questions for choosing heads, and for choosing gamma; the rest is for the table."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot calibrate anything."""
        check_settings(self)
        if self.probe_gamma in (1.0, float("inf")):
            raise ConfigError(
                f"probe_gamma must be a number other than 1, which changes nothing; got {self.probe_gamma}"
            )
        if self.share == 0.0:
            raise ConfigError("share must be above 0; got 0, which takes no head")
        shown = ", ".join(f"{gamma:g}" for gamma in self.gammas) or "none"
        if not all(0.0 < gamma < float("inf") for gamma in self.gammas):
            raise ConfigError(f"gammas must be above 0; got {shown}")
        if not (
            any(gamma > 1.0 for gamma in self.gammas) and any(gamma < 1.0 for gamma in self.gammas)
        ):
            # Which side is searched is known after the profile only: too late to refuse.
            raise ConfigError(
                f"gammas must lie on both sides of 1, because the heads decide which side is used; got "
                f"{shown}; add one"
            )


@dataclass(frozen=True)
class ActCalibration:
    """How ACT's heads are filtered; card act section 3."""

    alpha: float = setting(5.0, "a key is a sink above alpha / n of mean attention", low=0.0)
    beta: float = setting(0.4, "factor on the attention to sinks", low=0.0, high=1.0)
    mode: str = setting("causal", "rows a sink is judged by", choices=("causal", "full"))
    protect_first: bool = setting(True, "leave the first token alone")
    race: str = setting(
        "margin",
        "how heads are dropped early: exact, or by margins too",
        choices=("margin", "exact"),
    )
    reach: float = setting(
        2.0,
        "race=margin: a head is done at margins so many times the largest change it has made",
        low=1.0,
    )
    probes: int = setting(48, "race=margin: rows a head runs on before it can be done", low=1)
    take: str = setting(
        "all",
        "of the heads that won alone: all, or the strongest that do best together on a part of their own",
        choices=("all", "best"),
    )
    skip_first_layers: int = setting(2, "layers at the entry that are left alone", low=0)
    skip_last_layers: int = setting(1, "layers at the end that are left alone", low=0)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the questions for choosing heads, and for choosing how many; the rest is for the table."""
        return (0.75, 0.0) if self.take == "all" else (0.5, 0.25)

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_settings(self)
        if self.beta == 1.0:
            raise ConfigError(
                "beta must be below 1; 1 changes nothing, so there is nothing to choose"
            )


@dataclass(frozen=True)
class Calibrated:
    """Chosen heads and settings, with what they were chosen by."""

    name: str
    settings: dict[str, Any]
    heads: tuple[tuple[int, int], ...]
    table: dict[str, dict[str, float]]
    """Metrics on the test part: uncalibrated, calibrated, and as many random heads."""
    scores: dict[str, Any]
    """What the choice went by."""
    layer_forwards: int
    """Blocks run, one for each question; parts of blocks count as such."""
    layer_forwards_naive: int
    """Blocks that the search of one head at a time on whole passes would have run."""

    def document(self, spec: ModelSpec, about: dict[str, Any], config: Any) -> dict[str, Any]:
        """The intervention file: what ``model.edit`` and ``--intervention`` load."""
        return {
            "name": self.name,
            "version": VERSION,
            "model": spec.name,
            "revision": spec.revision,
            "layers": spec.n_layers,
            "n_heads": spec.n_heads,
            "heads": [list(head) for head in self.heads],
            **self.settings,
            "calibration": {
                **about,
                "config": asdict(config),
                "table": self.table,
                "scores": self.scores,
                "layer_forwards": self.layer_forwards,
                "layer_forwards_naive": self.layer_forwards_naive,
            },
        }
