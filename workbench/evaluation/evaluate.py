"""Evaluate a model on a task, stock and under an intervention, on the same questions."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from workbench.evaluation.measures import Difference, Scored, difference
from workbench.evaluation.scoring import (
    Encoded,
    Settings,
    encode_questions,
    largest_batch,
    score,
)
from workbench.evaluation.seen import seen_in_calibration
from workbench.evaluation.task import Question, Task
from workbench.identity import describe_intervention
from workbench.memory import backing_off
from workbench.models.base import ModelAdapter


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model, and of the stock model where an intervention was compared with it."""

    task: str
    model: str
    revision: str
    scoring: str
    scored: Scored
    stock: Scored | None = None
    interventions: tuple[dict[str, Any], ...] = ()
    seen: int = 0
    """Questions that the intervention was chosen on."""

    def metrics(self) -> dict[str, float]:
        """The headline numbers, of the model under the interventions."""
        return self.scored.metrics()

    def differences(self, seed: int = 0) -> dict[str, Difference]:
        """Edited minus stock, for what was written and for the labels alone.

        Of the margin, p is that of a sign test: as many questions gained margin as lost some.
        """
        if self.stock is None:
            return {}
        return {
            "accuracy": difference(self.stock.correct, self.scored.correct, seed),
            "label_accuracy": difference(self.stock.label_correct, self.scored.label_correct, seed),
            "margin": difference(self.stock.margins, self.scored.margins, seed),
        }

    def document(self) -> dict[str, Any]:
        """Everything as JSON data, without the single questions."""
        about = {
            "task": self.task,
            "model": self.model,
            "revision": self.revision,
            "scoring": self.scoring,
            "interventions": list(self.interventions),
        }
        compared: dict[str, Any] = {}
        if self.stock is not None:
            changes = {name: asdict(change) for name, change in self.differences().items()}
            compared = {
                "stock": self.stock.metrics(),
                "difference": changes,
                "seen_in_calibration": self.seen,
            }
        return {**about, **self.metrics(), **compared}

    def rows(self) -> list[dict[str, Any]]:
        """One row a question."""
        names = [field.name for field in fields(Scored)]
        columns = [getattr(self.scored, name) for name in names]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        if self.stock is not None:
            for row, parsed, scores in zip(rows, self.stock.parsed, self.stock.scores, strict=True):
                row |= {"stock_parsed": parsed, "stock_scores": scores}
        return rows


def evaluate(
    model: ModelAdapter,
    task: Task,
    questions: Sequence[Question],
    intervention: Any = None,
    settings: Settings | None = None,
) -> Evaluation:
    """Score a model on questions; with an intervention, the stock model on the same ones as well.

    Args:
        model: Interventions that are active on it already belong to "stock" here.
        task: Where the questions came from.
        questions: All of them, with their examples in front.
        intervention: What ``model.edit`` takes; None: evaluate the model as it is.
        settings: How to score.

    Raises:
        WorkbenchError: Before anything runs, if a question or the intervention does not fit.
    """
    settings = settings or Settings()
    encoded = encode_questions(model, questions, settings)
    with nullcontext() if intervention is None else model.edit(intervention):
        active = tuple(describe_intervention(item) for item in model.interventions)
    if settings.batch_size is not None:
        stock, scored = _both(model, encoded, intervention, settings)
    else:

        def attempt(size: int) -> tuple[Scored | None, Scored]:
            return _both(model, encoded, intervention, replace(settings, batch_size=size))

        size = largest_batch(model, encoded, settings)
        stock, scored = backing_off(size, attempt, len(encoded), settings.report)
    spec = model.spec
    seen = 0 if intervention is None else seen_in_calibration(questions, intervention)
    about = (task.name, spec.name, spec.revision, settings.scoring)
    return Evaluation(*about, scored, stock, active, seen)


def _both(
    model: ModelAdapter, encoded: Sequence[Encoded], intervention: Any, settings: Settings
) -> tuple[Scored | None, Scored]:
    """Scores of the stock model, where there is an intervention, and of the model under it."""
    if intervention is None:
        return None, score(model, encoded, settings)
    n = len(encoded)

    def half(before: int) -> Settings:
        return replace(settings, progress=lambda done, _: settings.progress(before + done, 2 * n))

    stock = score(model, encoded, half(0))
    with model.edit(intervention):
        return stock, score(model, encoded, half(n))


def with_examples(
    task: Task, questions: Sequence[Question], examples: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Put ``shots`` solved examples, drawn once with the seed, in front of every question.

    Raises:
        ConfigError: Fewer examples than shots, or a question among the examples.
    """
    import random

    from workbench.errors import ConfigError

    if not 0 <= shots <= len(examples):
        raise ConfigError(
            f"shots must lie in 0 ... {len(examples)}, the examples that were given; got {shots}; give "
            "more with --examples TRAIN.jsonl"
        )
    drawn = random.Random(seed).sample(list(examples), shots)
    asked = {question.prompt for question in questions}
    if any(example.prompt in asked for example in drawn):
        raise ConfigError(
            "examples must not be among the questions; at least one is; give a file of other rows"
        )
    return [task.with_examples(question, drawn) for question in questions]
