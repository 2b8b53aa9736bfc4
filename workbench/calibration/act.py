"""ACT's head filter: keep the heads that answer more questions right when they alone are calibrated.

The paper runs every head on the whole calibration set, one at a time. Four things save work here and
change nothing about the choice:

* the residual stream in front of each block is kept, so a head's pass begins at its own block;
* a head without a sink to damp in a prompt gives the stock answer: that row is not run;
* wrong answers of the stock model come first: a head that mends none of them is out;
* a head is out as soon as it has spoiled as many right answers as it mended.

Card: act section 3.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from workbench.calibration.controls import control_table
from workbench.calibration.effects import Work, answers_of_rows, prepare, stock_answers
from workbench.calibration.settings import ActCalibration, Calibrated, Run, Splits
from workbench.errors import ConfigError
from workbench.evaluation.scoring import Encoded, Settings, encode_questions
from workbench.interventions.act import ACT, DampedMass
from workbench.models.base import ModelAdapter

Head = tuple[int, int]


@dataclass
class Race:
    """Answers mended and spoiled by each head that is still in."""

    won: dict[Head, int] = field(default_factory=dict)
    lost: dict[Head, int] = field(default_factory=dict)

    def heads(self, *, mending: bool) -> list[Head]:
        """Those that can still be kept: all while mending, then those ahead."""
        return [head for head in self.won if mending or self.won[head] > self.lost[head]]


def calibrate_act(
    model: ModelAdapter, splits: Splits, config: ActCalibration, run: Run
) -> Calibrated:
    """Filter the heads of ACT on the profile part and table the choice on the test part.

    Raises:
        ConfigError: The skipped layers leave none.
    """
    layers = range(config.skip_first_layers, model.spec.n_layers - config.skip_last_layers)
    if not layers:
        raise ConfigError(
            f"skipped layers must leave at least one of {model.spec.n_layers}; got "
            f"{config.skip_first_layers} and {config.skip_last_layers}; set them lower"
        )
    intervention = ACT(config.alpha, config.beta, mode=config.mode)
    questions = encode_questions(model, splits.profile, Settings())
    race, work = filter_heads(model, questions, intervention, layers, run)
    heads = tuple(head for head in race.won if race.won[head] > race.lost[head])
    n_rows = len(layers) * model.spec.n_heads
    return Calibrated(
        name="act",
        settings={"alpha": config.alpha, "beta": config.beta, "mode": config.mode},
        heads=heads,
        table=control_table(model, splits.test, intervention, heads, run),
        scores={
            "won": {f"L{layer}H{head}": race.won[layer, head] for layer, head in heads},
            "lost": {f"L{layer}H{head}": race.lost[layer, head] for layer, head in heads},
        },
        layer_forwards=work.layer_forwards,
        layer_forwards_naive=(n_rows + 1) * len(questions) * model.spec.n_layers,
    )


def filter_heads(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    intervention: ACT,
    layers: Iterable[int],
    run: Run,
) -> tuple[Race, Work]:
    """Race the heads of some layers; a head with more won than lost is kept."""
    work = Work()
    right = stock_answers(model, questions, run.batch_size, work).margin > 0
    race = Race()
    for layer in layers:
        for head in range(model.spec.n_heads):
            race.won[layer, head] = race.lost[layer, head] = 0
    order = [*(~right).nonzero()[:, 0].tolist(), *right.nonzero()[:, 0].tolist()]
    n_wrong = int((~right).sum())
    starts = [*range(0, n_wrong, run.batch_size), *range(n_wrong, len(order), run.batch_size)]
    for start in starts:
        mending = start < n_wrong
        stop = min(start + run.batch_size, n_wrong if mending else len(order))
        heads = race.heads(mending=mending)
        if not heads:
            break
        batch = [questions[index] for index in order[start:stop]]
        part = run.piece(
            f"act-{start}",
            partial(
                _batch_changes, model, batch, intervention, heads, run.batch_size, mending=mending
            ),
        )
        score = race.won if mending else race.lost
        for (layer, head), changed in zip(
            part["heads"].tolist(), part["changed"].tolist(), strict=True
        ):
            score[layer, head] += changed
        work.layer_forwards += int(part["work"])
        run.progress(stop, len(order))
    run.progress(len(order), len(order))
    return race, work


def _batch_changes(
    model: ModelAdapter,
    batch: Sequence[Encoded],
    intervention: ACT,
    heads: Sequence[Head],
    batch_size: int,
    *,
    mending: bool,
) -> dict[str, torch.Tensor]:
    """How many answers of a batch each head changes, and the blocks that were run."""
    work = Work()
    prepared = prepare(model, batch, DampedMass(intervention), work)
    assert prepared.touched is not None
    changed = dict.fromkeys(heads, 0)
    for layer in sorted({layer for layer, _ in heads}):
        rows = [
            (question, head)
            for at, head in heads
            if at == layer
            for question in prepared.touched[layer, :, head].nonzero()[:, 0].tolist()
        ]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            right = answers_of_rows(model, prepared, intervention, layer, part, work).margin > 0
            for (_, head), is_right in zip(part, right.tolist(), strict=True):
                changed[layer, head] += int(is_right == mending)
    return {
        "heads": torch.tensor(heads),
        "changed": torch.tensor([changed[head] for head in heads]),
        "work": torch.tensor(work.layer_forwards),
    }
