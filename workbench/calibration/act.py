"""ACT's calibration: keep the heads that answer more questions right when they alone are calibrated.

The paper runs every head on the whole calibration set, one at a time; ``race`` finds the same heads for
less. All winners then apply together (``take=all``), and the test part shows what that does. Heads that
win alone may spoil each other's answers, which the paper does not look at: ``take=best`` takes so many
of the strongest winners as answer most questions right together, on a part that chose no head; none,
where the uncalibrated model is as good. Card: act section 3.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from workbench.calibration.controls import control_table
from workbench.calibration.effects import Work, stock_answers
from workbench.calibration.parts import Splits, encode_parts
from workbench.calibration.race import filter_heads
from workbench.calibration.settings import ActCalibration, Calibrated, Run
from workbench.errors import ConfigError
from workbench.evaluation.scoring import Encoded
from workbench.interventions.act import ACT
from workbench.models.base import ModelAdapter

SETTINGS = ("alpha", "beta", "protect_first", "mode")
"""Of the intervention, taken over from the calibration's."""


def calibrate_act(
    model: ModelAdapter, splits: Splits, config: ActCalibration, run: Run
) -> Calibrated:
    """Filter the heads of ACT on the profile part and table the choice on the test part.

    With ``take=best`` the validation part chooses how many; else it chooses heads as well.

    Raises:
        ConfigError: The skipped layers leave none.
        DataError: A question that cannot be scored.
    """
    spec, layers = model.spec, _layers(model, config)
    settings = {name: getattr(config, name) for name in SETTINGS}
    intervention = ACT(**settings)
    takes_best = config.take == "best"
    parts = encode_parts(model, splits, validates=takes_best)
    # Where nothing else is chosen, heads are: no question stays unused.
    asked = parts.profile if takes_best else [*parts.profile, *parts.validation]
    reach = config.reach if config.race == "margin" else None
    race, stock, work = filter_heads(
        model, asked, intervention, layers, run, reach=reach, probes=config.probes
    )
    heads, together = race.kept(), {}
    if takes_best:
        strongest = sorted(heads, key=lambda head: int(race.lost[head] - race.won[head]))
        together = _together(model, parts.validation, intervention, strongest, run, work)
        best = max(together, key=lambda n: (together[n], -n))
        heads = tuple(sorted(strongest[:best]))

    n_tried = len(layers) * spec.n_heads
    n_whole = (n_tried + 1) * len(asked) + len(together) * len(parts.validation)
    scores: dict[str, Any] = {
        "won": _by_head(race.won, race.kept()),
        "lost": _by_head(race.lost, race.kept()),
        "rows_with_sinks": int(stock.touched[list(layers)].sum()),
        "rows_run": int(race.run.sum()),
    }
    if takes_best:
        scores["validation"] = {str(n): list(value) for n, value in together.items()}
    return Calibrated(
        name="act",
        settings=settings,
        heads=heads,
        table=control_table(model, parts.test, intervention, heads, layers, run),
        scores=scores,
        layer_forwards=round(work.layer_forwards),
        layer_forwards_naive=n_whole * spec.n_layers,
    )


def _layers(model: ModelAdapter, config: ActCalibration) -> range:
    """The layers whose heads may be chosen."""
    n_layers = model.spec.n_layers
    layers = range(config.skip_first_layers, n_layers - config.skip_last_layers)
    if not layers:
        raise ConfigError(
            f"skipped layers must leave at least one of {n_layers}; got "
            f"skip_first_layers={config.skip_first_layers} and "
            f"skip_last_layers={config.skip_last_layers}; set them lower"
        )
    return layers


def _by_head(values: Tensor, heads: Sequence[tuple[int, int]]) -> dict[str, int]:
    return {f"L{layer}H{head}": int(values[layer, head]) for layer, head in heads}


def _together(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    intervention: ACT,
    strongest: Sequence[tuple[int, int]],
    run: Run,
    work: Work,
) -> dict[int, tuple[float, float]]:
    """Accuracy and mean margin under the first n heads, by n; 0: the stock model."""
    found = {}
    for n in range(len(strongest) + 1):
        with model.edit(replace(intervention, heads=tuple(strongest[:n]))):
            margin = stock_answers(model, questions, run.batch_size, work).margin
        found[n] = float((margin > 0).float().mean()), float(margin.mean())
    return found
