"""What a calibration is told, and what it gives."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import ConfigError, DataError
from workbench.evaluation.task import Question
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
    share: float = setting(0.4, "share of all heads to take", low=0.0, high=1.0, exclusive=False)
    gammas: tuple[float, ...] = setting(
        (0.25, 0.5, 0.75, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), "gammas to choose from"
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot calibrate anything."""
        check_settings(self)
        if self.probe_gamma == 1.0 or not self.gammas or min(self.gammas) <= 0.0:
            raise ConfigError(
                "probe_gamma must not be 1 and gammas must be above 0; got "
                f"{self.probe_gamma} and {', '.join(map(str, self.gammas)) or 'none'}"
            )


@dataclass(frozen=True)
class ActCalibration:
    """How ACT's heads are filtered; card act section 3."""

    alpha: float = setting(5.0, "a key is a sink above alpha / n of mean attention", low=0.0)
    beta: float = setting(0.4, "factor on the attention to sinks", low=0.0, high=1.0)
    mode: str = setting("causal", "rows a sink is judged by", choices=("causal", "full"))
    skip_first_layers: int = setting(2, "layers at the entry that are left alone", low=0)
    skip_last_layers: int = setting(1, "layers at the end that are left alone", low=0)

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_settings(self)
        if self.beta == 1.0:
            raise ConfigError(
                "beta must be below 1; 1 changes nothing, so there is nothing to choose"
            )


@dataclass(frozen=True)
class Splits:
    """Questions for choosing heads, for choosing settings, and for the table; no row in two."""

    profile: list[Question]
    validation: list[Question]
    test: list[Question]


SHARES = (0.5, 0.25)
"""Of the rows for ``profile`` and ``validation``; the rest is ``test``."""
MIN_ROWS = 8


def split(questions: Sequence[Question], seed: int) -> Splits:
    """Part the questions at random; the same prompt is never in two parts.

    Raises:
        DataError: Too few different questions.
    """
    different = list({question.prompt: question for question in questions}.values())
    if len(different) < MIN_ROWS:
        raise DataError(
            f"a calibration needs at least {MIN_ROWS} different questions to keep choosing and testing "
            f"apart; got {len(different)}; give more rows"
        )
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    first = round(len(order) * SHARES[0])
    second = first + round(len(order) * SHARES[1])
    parts = (order[:first], order[first:second], order[second:])
    return Splits(*([different[index] for index in part] for part in parts))


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
    """Blocks run, one for each question."""
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


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of prompts, labels and answers."""
    content = [[item.prompt, list(item.labels), item.answer] for item in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
