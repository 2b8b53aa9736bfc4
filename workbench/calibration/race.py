"""Which heads mend more answers than they spoil, each alone under ACT: a race that spares most passes.

The search that this stands in for runs every head on every question on whole passes. Here

* one pass a question gives the stock answer and all that a head's pass goes on from (kept while memory
  lasts): it begins behind the attention of its own block, at the first position with a sink to damp;
* a head without a sink to damp in a question leaves its answer as it is: that row is not run;
* wrong answers come first: a head that mends none of them is out;
* then right answers: a head is out as soon as it has spoiled as many as it mended.

Those change nothing about the choice (``exact``). ``margin``, the default, also passes over rows far
from the border: questions come in the order of their stock margin, closest first, and a head is done
when the next margin is more than ``reach`` times the largest change of any margin it has made, on at
least ``PROBES`` rows that are spread over all margins. That is no proof; with reach 2 it chose the heads
of the whole search wherever the two were compared (docs/interventions.md).

Card: act section 3.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.calibration.effects import Work
from workbench.calibration.prepared import Kept, prepare
from workbench.calibration.settings import Run
from workbench.evaluation.scoring import Encoded
from workbench.interventions.act import ACT
from workbench.interventions.damped_mass import DampedMass
from workbench.models.base import ModelAdapter

Head = tuple[int, int]
STEP = 16
"""Questions after which heads that are done leave the race; a forward pass may hold more rows."""
LEAST = 2
"""Questions for every probe; with fewer, probes cost what they save, and the race is the exact one."""


@dataclass(frozen=True)
class Stock:
    """What one pass over every question tells."""

    margin: Float[Tensor, " row"]
    """Of the stock model, in nats; right answers are above 0."""
    touched: Bool[Tensor, "layer head row"]
    """Where the intervention would change a pattern."""


@dataclass
class Race:
    """What each head that takes part has done so far."""

    heads: tuple[Head, ...]
    won: Int[Tensor, "layer head"]
    """Wrong answers that became right."""
    lost: Int[Tensor, "layer head"]
    """Right answers that became wrong."""
    moved: Float[Tensor, "layer head"]
    """Largest change of a margin, in nats."""
    run: Int[Tensor, "layer head"]
    """Rows that were run."""

    @staticmethod
    def of(heads: Iterable[Head], n_layers: int, n_heads: int) -> "Race":
        """The start."""
        size = (n_layers, n_heads)
        counts = [torch.zeros(size, dtype=torch.long) for _ in range(3)]
        return Race(tuple(heads), counts[0], counts[1], torch.zeros(size), counts[2])

    def kept(self) -> tuple[Head, ...]:
        """Heads that mended more than they spoiled."""
        ahead = self.won > self.lost
        return tuple(head for head in self.heads if ahead[head])

    def add(self, part: dict[str, Tensor]) -> None:
        """Take in what a batch of rows showed."""
        self.won += part["won"]
        self.lost += part["lost"]
        self.run += part["run"]
        self.moved = torch.maximum(self.moved, part["moved"])


@dataclass(frozen=True)
class Field:
    """What a race is run on."""

    stock: Stock
    kept: Kept
    batch_size: int


def filter_heads(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    intervention: ACT,
    layers: Sequence[int],
    run: Run,
    *,
    reach: float | None = 2.0,
    probes: int = 48,
) -> tuple[Race, Stock, Work]:
    """Race the heads of some layers.

    Args:
        model: The stock model.
        questions: What the heads are chosen on.
        intervention: ACT's settings; its heads do not matter.
        layers: Whose heads take part.
        run: Batch size, progress, kept parts.
        reach: See the module's docstring; None: the exact race.
        probes: Rows a head must have run on before it can be done by its margins.
    """
    work, spec = Work(), model.spec
    kept = Kept(model, questions, intervention, layers)
    stock = _survey(kept, run, work)
    field = Field(stock, kept, run.batch_size)
    heads = [(layer, head) for layer in layers for head in range(spec.n_heads)]
    race = Race.of(heads, spec.n_layers, spec.n_heads)
    n_done, total = len(questions), 2 * len(questions)
    if reach is None or len(questions) < LEAST * probes:
        reach, probes = float("inf"), 0
    for name, rows in _waves(stock.margin, probes):
        for start in range(0, len(rows), STEP):
            batch = rows[start : start + STEP]
            pairs = _pairs(race, stock, batch, (reach, probes), spoiling=name == "right")
            if pairs:
                part = run.piece(f"act-rows-{name}-{start}", partial(_run_pairs, field, pairs))
                race.add(part)
                work.layer_forwards += float(part["work"])
            n_done += len(batch)
            run.progress(n_done, total)
    return race, stock, work


def _survey(kept: Kept, run: Run, work: Work) -> Stock:
    """Run every question once; those of like length together."""
    questions = kept.questions
    order = sorted(range(len(questions)), key=lambda row: len(questions[row].prompt))
    parts = []
    for start in range(0, len(order), run.batch_size):
        rows = order[start : start + run.batch_size]
        parts.append(run.piece(f"act-survey-{start}", partial(_survey_batch, kept, rows)))
        run.progress(start + len(rows), 2 * len(order))
    work.layer_forwards += sum(float(part["work"]) for part in parts)
    back = torch.tensor(order).argsort()
    margin = torch.cat([part["margin"] for part in parts])[back]
    return Stock(margin, torch.cat([part["touched"] for part in parts], dim=-1)[..., back])


def _survey_batch(kept: Kept, rows: Sequence[int]) -> dict[str, Tensor]:
    work, batch = Work(), [kept.questions[row] for row in rows]
    touches = DampedMass(kept.intervention)
    prepared = prepare(kept.model, batch, kept.intervention, kept.layers, work, touches)
    kept.keep(rows, prepared)
    return {
        "margin": prepared.stock.margin,
        "touched": prepared.touched.transpose(1, 2),
        "work": torch.tensor(work.layer_forwards, dtype=torch.float64),
    }


def _waves(margin: Float[Tensor, " row"], n_probes: int) -> Iterator[tuple[str, list[int]]]:
    """Probes, then wrong answers, then right ones; the closest to the border first."""
    order = margin.abs().argsort(stable=True).tolist()
    n_probes = min(n_probes, len(order))
    probes = [order[int((k + 0.5) * len(order) / n_probes)] for k in range(n_probes)]
    rest = [row for row in order if row not in set(probes)]
    yield "probes", probes
    yield "wrong", [row for row in rest if margin[row] <= 0]
    yield "right", [row for row in rest if margin[row] > 0]


def _pairs(
    race: Race, stock: Stock, rows: Sequence[int], rule: tuple[float, int], *, spoiling: bool
) -> list[tuple[int, int, int]]:
    """(layer, head, row) that must still be run, by reach and number of probes."""
    reach, probes = rule
    index = torch.tensor(rows)
    wanted = stock.touched[..., index]
    if spoiling:
        wanted = wanted & (race.won > race.lost)[..., None]
    if reach < float("inf"):
        near = stock.margin[index].abs() <= reach * race.moved[..., None]
        wanted = wanted & (near | (race.run < probes)[..., None])
    return [
        (layer, head, rows[at])
        for layer, head in race.heads
        for at in wanted[layer, head].nonzero()[:, 0].tolist()
    ]


def _run_pairs(field: Field, pairs: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Run rows, each under its own head: who won, who lost, how far margins moved."""
    work, numbers = Work(), sorted({row for _, _, row in pairs})
    rows = field.kept.rows(numbers, work)
    race = Race.of((), *field.stock.touched.shape[:2])
    for layer in sorted({layer for layer, _, _ in pairs}):
        here = [(row, head) for at, head, row in pairs if at == layer]
        places = [(numbers.index(row), head) for row, head in here]
        after = rows.answers(layer, places, field.batch_size, work).margin
        for (row, head), margin in zip(here, after.tolist(), strict=True):
            before = float(field.stock.margin[row])
            race.won[layer, head] += before <= 0 < margin
            race.lost[layer, head] += margin <= 0 < before
            race.run[layer, head] += 1
            race.moved[layer, head] = max(float(race.moved[layer, head]), abs(margin - before))
    found = {"won": race.won, "lost": race.lost, "moved": race.moved, "run": race.run}
    return {**found, "work": torch.tensor(work.layer_forwards, dtype=torch.float64)}
