"""``workbench evaluate``: a model on a task, stock and under an intervention."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.card import number_text
from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_table, reporting
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from workbench.evaluation.evaluate import Evaluation
    from workbench.run import Reporter


@dataclass(frozen=True)
class EvaluateRequest:
    """The options of ``workbench evaluate``."""

    model: given.ModelName
    data: Annotated[Path, typer.Option(metavar="TEST.jsonl", help="The questions.")]
    task: Annotated[
        str, typer.Option(metavar="NAME", help="agnews, arc, boolq, sst2, mt-bench or a FILE.json.")
    ]
    intervention: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|NAME", help="What to change; 'workbench list interventions'."
        ),
    ] = None
    settings: given.Settings = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")
    ] = None
    shots: Annotated[int, typer.Option(metavar="K", help="Solved examples before each.")] = 0
    examples: Annotated[
        Path | None, typer.Option(metavar="TRAIN.jsonl", help="Where examples are drawn from.")
    ] = None
    scoring: Annotated[
        str, typer.Option(metavar="S", help="first-token, or loglikelihood of the whole label.")
    ] = "first-token"
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of an answer: 5, of mt-bench 64."),
    ] = None
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Questions at once.")] = "auto"
    seed: Annotated[int, typer.Option(metavar="S", help="Of the examples.")] = 0
    backend: given.Backend = "hf"
    dtype: given.Dtype = "auto"
    device: given.Device = "auto"
    revision: given.Revision = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="One row a question, as .jsonl."),
    ] = None
    progress: given.Progress = "auto"
    as_json: given.AsJson = False

    def load(self) -> Any:
        """The model, as it is to be loaded."""
        return given.load_model(self.model, self.backend, self.revision, self.dtype, self.device)


@given.takes(EvaluateRequest)
def evaluate_command(request: EvaluateRequest) -> None:
    """Measure accuracy, honestly: what is written, what the labels say, and what cannot be read.

    With an intervention the stock model answers the same questions; intervals are bootstrapped over
    questions, p is McNemar's.

    Example: workbench evaluate --model M --data sst2_test.jsonl --task sst2 --intervention zerotuning
    --set gamma=2
    """
    if request.intervention is None and request.settings:
        raise typer.BadParameter("--set needs --intervention FILE.json|NAME")
    few = request.shots or request.examples or request.scoring != "first-token"
    if request.task == "mt-bench" and few:
        raise typer.BadParameter("mt-bench takes no --shots, --examples or --scoring")
    given.check_output(request.output)
    change = _intervention(request.intervention, request.settings)
    with reporting(request.progress) as reporter:
        if request.task == "mt-bench":
            _answer_turns(request, change, reporter)
            return
        evaluation = _evaluate(request, change, reporter)
    if request.output is not None:
        _write_rows(request.output, evaluation.rows())
    print_json(evaluation.document()) if request.as_json else _show(evaluation)
    if evaluation.seen:
        message(
            f"{evaluation.seen} of the {len(evaluation.scored.correct)} questions chose this intervention: "
            "on them it is not tested; give others"
        )


def _evaluate(request: EvaluateRequest, change: Any, reporter: "Reporter") -> "Evaluation":
    from workbench.evaluation.evaluate import evaluate, with_examples
    from workbench.evaluation.scoring import Settings
    from workbench.evaluation.task import find_task, read_questions

    found = find_task(request.task)
    questions = read_questions(found, request.data, request.limit)
    solved = read_questions(found, request.examples) if request.examples else []
    if request.shots or request.examples:
        questions = with_examples(found, questions, solved, request.shots, request.seed)
    how = Settings(
        request.scoring,
        given.read_batch_size(request.batch_size),
        request.max_new_tokens or 5,
        reporter.progress,
        reporter.message,
    )
    return evaluate(request.load(), found, questions, change, how)


def _intervention(name: str | None, settings: list[str] | None) -> Any:
    from workbench.cli.generate import read_intervention

    return None if name is None else read_intervention(name, given.read_settings(settings))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    given.write_output(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    message(f"written: {path}")


def _answer_turns(request: EvaluateRequest, change: Any, reporter: "Reporter") -> None:
    """Write conversations to a file for a judge."""
    from workbench.evaluation.chat import answer_turns, read_turns

    if request.output is None:
        raise ConfigError("answers for a judge go to a file; add -o ANSWERS.jsonl")
    rows = read_turns(request.data, request.limit)
    model, n_new = request.load(), request.max_new_tokens or 64
    with nullcontext() if change is None else model.edit(change):
        label = model.spec.name if change is None else f"{model.spec.name}+intervention"
        answers = answer_turns(model, rows, label, max_new_tokens=n_new, progress=reporter.progress)
    _write_rows(request.output, answers)
    if request.as_json:
        print_json({"task": request.task, "n": len(answers), "path": str(request.output)})


def _show(evaluation: "Evaluation") -> None:
    metrics, stock = evaluation.metrics(), evaluation.stock
    if stock is None:
        print_table(
            ("metric", "value"), [(name, number_text(float(v))) for name, v in metrics.items()]
        )
        return
    before, changes = stock.metrics(), evaluation.differences()
    rows = []
    for name, value in metrics.items():
        change = changes.get(name)
        interval = f"{change.low:+.3f} to {change.high:+.3f}" if change else ""
        p = f"{change.p:.3g}" if change else ""
        rows.append(
            (name, number_text(float(before[name])), number_text(float(value)), interval, p)
        )
    print_table(("metric", "stock", "edited", "95 % of the difference", "p"), rows)
