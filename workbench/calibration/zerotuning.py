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
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.calibration.controls import control_table
from workbench.calibration.effects import Answers, Work, answers_of_rows, prepare, stock_answers
from workbench.calibration.gradient import gradient_profile
from workbench.calibration.settings import Calibrated, Run, Splits, ZeroTuningCalibration
from workbench.errors import ConfigError
from workbench.evaluation.scoring import Encoded, Settings, encode_questions
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelAdapter

Heads = tuple[tuple[int, int], ...]


def calibrate_zerotuning(
    model: ModelAdapter, splits: Splits, config: ZeroTuningCalibration, run: Run
) -> Calibrated:
    """Choose heads and gamma on the profile and validation parts; table the choice on the test part."""
    work = Work()
    settings = Settings()
    profiled = encode_questions(model, splits.profile, settings)
    validated = encode_questions(model, splits.validation, settings)
    proxy = None
    if "gradients" in model.capabilities and config.mode == "score":
        proxy = gradient_profile(model, profiled, config.objective, run.batch_size, work)
    effect = _effect(model, profiled, config, run, proxy, work)
    is_up, heads = dominant_heads(effect, config.share)
    gammas = [gamma for gamma in config.gammas if (gamma > 1.0) == is_up and gamma != 1.0]
    if not gammas:
        raise ConfigError(
            f"gammas must have one {'above' if is_up else 'below'} 1, because the dominant heads are "
            f"{'up' if is_up else 'down'}-effective; got {', '.join(map(str, config.gammas))}"
        )
    grid = {
        gamma: _objective(model, validated, heads, gamma, config, run, work) for gamma in gammas
    }
    baseline = _objective(model, validated, (), 1.0, config, run, work)
    best = max(grid, key=lambda gamma: grid[gamma])
    if not heads or grid[best] <= baseline:
        heads, best = (), 1.0
    spec = model.spec
    whole = spec.n_layers * spec.n_heads + 1
    return Calibrated(
        name="zerotuning",
        settings={"gamma": best, "mode": config.mode},
        heads=heads,
        table=control_table(model, splits.test, ZeroTuning(best, mode=config.mode), heads, run),
        scores={
            "dominant": "up" if is_up else "down",
            "profile": [[round(value, 6) for value in row] for row in effect.tolist()],
            "validation": {str(gamma): list(value) for gamma, value in grid.items()},
            "validation_uncalibrated": list(baseline),
            **(
                {}
                if proxy is None
                else {"gradient_rank_correlation": rank_correlation(proxy, effect)}
            ),
        },
        layer_forwards=work.layer_forwards,
        layer_forwards_naive=whole * len(profiled) * spec.n_layers
        + (len(gammas) + 1) * len(validated) * spec.n_layers,
    )


def _effect(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    config: ZeroTuningCalibration,
    run: Run,
    proxy: Tensor | None,
    work: Work,
) -> Float[Tensor, "layer head"]:
    """How much each head alone helps when its attention to the first token grows."""
    if config.profile == "gradient":
        if proxy is None:
            raise ConfigError(
                f"profile=gradient needs mode=score and a backend with gradients (hf); {model.backend} "
                f"and mode={config.mode} were given; use profile=finite"
            )
        return proxy
    return finite_profile(model, questions, config, run, work)


def finite_profile(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    config: ZeroTuningCalibration,
    run: Run,
    work: Work,
) -> Float[Tensor, "layer head"]:
    """Change of the objective under ``probe_gamma`` on each head alone; above 0: up-effective."""
    n_layers, n_heads = model.spec.n_layers, model.spec.n_heads
    stock = stock_answers(model, questions, run.batch_size, work)
    change = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    for start in range(0, len(questions), run.batch_size):
        batch = questions[start : start + run.batch_size]
        part = run.piece(f"profile-{start}", partial(_batch_profile, model, batch, config, run))
        before = Answers(
            stock.margin[start : start + len(batch)], stock.entropy[start : start + len(batch)]
        )
        after = Answers(part["margin"], part["entropy"])
        difference = _values(after, config.objective) - _values(before, config.objective)
        change += difference.double().sum(dim=-1)
        work.layer_forwards += int(part["work"])
        run.progress(start + len(batch), len(questions))
    sign = 1.0 if config.probe_gamma > 1.0 else -1.0
    return (sign * change / len(questions)).float()


MARGIN_WEIGHT = 1e-4
"""Weight of the squashed margin beside a right answer: it orders ties and never outweighs one answer of
ten thousand."""


def _values(answers: Answers, objective: str) -> Tensor:
    """What is averaged over questions: larger is better."""
    if objective == "entropy":
        return -answers.entropy
    return (answers.margin > 0).float() + MARGIN_WEIGHT * torch.tanh(answers.margin)


def _batch_profile(
    model: ModelAdapter, batch: Sequence[Encoded], config: ZeroTuningCalibration, run: Run
) -> dict[str, Tensor]:
    """Margin and entropy ``[layer head question]`` with each head alone under the probe."""
    work = Work()
    prepared = prepare(model, batch, None, work)
    intervention = ZeroTuning(config.probe_gamma, mode=config.mode)
    n_layers, n_heads = model.spec.n_layers, model.spec.n_heads
    rows = [(question, head) for head in range(n_heads) for question in range(len(batch))]
    parts = [
        answers_of_rows(
            model, prepared, intervention, layer, rows[start : start + run.batch_size], work
        )
        for layer in range(n_layers)
        for start in range(0, len(rows), run.batch_size)
    ]
    size = (n_layers, n_heads, len(batch))
    return {
        "margin": torch.cat([part.margin for part in parts]).view(size),
        "entropy": torch.cat([part.entropy for part in parts]).view(size),
        "work": torch.tensor(work.layer_forwards),
    }


def dominant_heads(effect: Float[Tensor, "layer head"], share: float) -> tuple[bool, Heads]:
    """Whether up-effective heads are the more, and the strongest of the dominant type."""
    is_up = int((effect > 0).sum()) >= int((effect < 0).sum())
    signed = effect if is_up else -effect
    n_taken = min(round(share * effect.numel()), int((signed > 0).sum()))
    order = signed.flatten().argsort(descending=True, stable=True)[:n_taken].tolist()
    return is_up, tuple(sorted(divmod(index, effect.shape[1]) for index in order))


def _objective(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    heads: Heads,
    gamma: float,
    config: ZeroTuningCalibration,
    run: Run,
    work: Work,
) -> tuple[float, float]:
    """Objective on the validation part, ties ordered by the margin."""
    with model.edit(ZeroTuning(gamma, heads, mode=config.mode)):
        answers = stock_answers(model, questions, run.batch_size, work)
    margin = float(answers.margin.mean())
    if config.objective == "entropy":
        return -float(answers.entropy.mean()), 0.0
    return float((answers.margin > 0).float().mean()), margin


def rank_correlation(a: Float[Tensor, "layer head"], b: Float[Tensor, "layer head"]) -> float:
    """Spearman's correlation over heads; 0 where one of them does not vary."""
    from scipy.stats import spearmanr

    if len(a.unique()) < 2 or len(b.unique()) < 2:
        return 0.0
    return float(spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic)


def with_settings(calibrated: Calibrated) -> ZeroTuning:
    """The intervention that was chosen."""
    return replace(
        ZeroTuning(float(calibrated.settings["gamma"]), mode=str(calibrated.settings["mode"])),
        heads=calibrated.heads,
    )
