"""ZeroTuning's calibration: profile the heads, take the dominant type, choose gamma.

1. Each head alone under ``probe_gamma``: up-effective if more attention to the first token helps,
   down-effective if it hurts (a probe below 1 is read the other way round).
2. The type with more heads is dominant; of it the strongest are taken, ``share`` of all heads at most.
3. Gamma is chosen on the validation part: above 1 for up-effective heads, below 1 for down-effective.

Supervised, "helps" is a higher label accuracy, ties ordered by the mean margin; unsupervised, a lower
entropy of the next token where the answer begins. If no gamma beats the uncalibrated model there, the
result has no heads. Card: zerotuning section 3.
"""

from collections.abc import Sequence

from workbench.calibration.controls import control_table
from workbench.calibration.effects import Work, stock_answers
from workbench.calibration.parts import Splits, encode_parts
from workbench.calibration.profile import Heads, profile_heads
from workbench.calibration.settings import Calibrated, Run, ZeroTuningCalibration
from workbench.evaluation.scoring import Encoded
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter


def calibrate_zerotuning(
    model: ModelAdapter, splits: Splits, config: ZeroTuningCalibration, run: Run
) -> Calibrated:
    """Choose heads and gamma on the profile and validation parts; table the choice on the test part.

    Raises:
        ConfigError: ``profile=gradient`` where there are no gradients.
        DataError: A question that cannot be scored.
    """
    work = Work()
    parts = encode_parts(model, splits)
    profile = profile_heads(model, parts.profile, config, run, work)

    def objective(heads: Heads, gamma: float) -> tuple[float, float]:
        return _objective(
            model, parts.validation, ZeroTuning(gamma, heads, mode=config.mode), config, run, work
        )

    gammas = [gamma for gamma in config.gammas if (gamma > 1.0) == profile.is_up and gamma != 1.0]
    baseline = objective((), 1.0)
    grid = {gamma: objective(profile.heads, gamma) for gamma in gammas if profile.heads}
    best = max(grid, key=lambda gamma: grid[gamma], default=1.0)
    helps = bool(grid) and grid[best] > baseline
    heads, gamma = (profile.heads, best) if helps else ((), 1.0)
    n_layers = model.spec.n_layers
    n_whole = (n_layers * model.spec.n_heads + 1) * len(parts.profile)
    intervention = ZeroTuning(gamma, mode=config.mode)
    return Calibrated(
        name="zerotuning",
        settings={"gamma": gamma, "mode": config.mode},
        heads=heads,
        table=control_table(model, parts.test, intervention, heads, range(n_layers), run),
        scores={
            **profile.document(),
            "validation": {str(gamma): list(value) for gamma, value in grid.items()},
            "validation_uncalibrated": list(baseline),
        },
        layer_forwards=round(work.layer_forwards),
        layer_forwards_naive=(n_whole + (len(grid) + 1) * len(parts.validation)) * n_layers,
    )


def _objective(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    intervention: ZeroTuning,
    config: ZeroTuningCalibration,
    run: Run,
    work: Work,
) -> tuple[float, float]:
    """Objective on the validation part, ties ordered by the margin."""
    with model.edit(intervention):
        answers = stock_answers(model, questions, run.batch_size, work)
    if config.objective == "entropy":
        return -float(answers.entropy.mean()), 0.0
    return float((answers.margin > 0).float().mean()), float(answers.margin.mean())
