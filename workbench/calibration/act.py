"""ACT's calibration: keep the heads that answer more questions right when they alone are calibrated.

The paper runs every head on the whole calibration set, one at a time; ``race`` finds the same heads for
less. All winners then apply together, and the test part shows what that does. Card: act section 3.
"""

from typing import Any

from torch import Tensor

from workbench.calibration.controls import control_table
from workbench.calibration.parts import Splits, encode_parts
from workbench.calibration.race import filter_heads
from workbench.calibration.settings import ActCalibration, Calibrated, Run
from workbench.errors import ConfigError
from workbench.interventions.act import ACT
from workbench.models.base import ModelAdapter


def calibrate_act(
    model: ModelAdapter, splits: Splits, config: ActCalibration, run: Run
) -> Calibrated:
    """Filter the heads of ACT on the profile part and table the choice on the test part.

    Raises:
        ConfigError: The skipped layers leave none.
        DataError: A question that cannot be scored.
    """
    spec = model.spec
    layers = range(config.skip_first_layers, spec.n_layers - config.skip_last_layers)
    if not layers:
        raise ConfigError(
            f"skipped layers must leave at least one of {spec.n_layers}; got "
            f"skip_first_layers={config.skip_first_layers} and "
            f"skip_last_layers={config.skip_last_layers}; set them lower"
        )
    settings: dict[str, Any] = {
        "alpha": config.alpha,
        "beta": config.beta,
        "protect_first": config.protect_first,
        "mode": config.mode,
    }
    intervention = ACT(**settings)
    parts = encode_parts(model, splits)
    reach = config.reach if config.race == "margin" else None
    race, stock, work = filter_heads(
        model, parts.profile, intervention, layers, run, reach=reach, probes=config.probes
    )
    heads = race.kept()

    def by_head(values: Tensor) -> dict[str, int]:
        return {f"L{layer}H{head}": int(values[layer, head]) for layer, head in heads}

    n_tried = len(layers) * spec.n_heads
    return Calibrated(
        name="act",
        settings=settings,
        heads=heads,
        table=control_table(model, parts.test, intervention, heads, layers, run),
        scores={
            "won": by_head(race.won),
            "lost": by_head(race.lost),
            "rows_with_sinks": int(stock.touched[list(layers)].sum()),
            "rows_run": int(race.run.sum()),
        },
        layer_forwards=round(work.layer_forwards),
        layer_forwards_naive=(n_tried + 1) * len(parts.profile) * spec.n_layers,
    )
