"""``workbench evaluate``: a model on a task, stock and under an intervention."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import message, number_text, print_json, print_table, reporting
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from workbench.evaluation.evaluate import Evaluation


def evaluate_command(
    model: given.ModelName,
    data: Annotated[Path, typer.Option(metavar="TEST.jsonl", help="The questions.")],
    task: Annotated[
        str, typer.Option(metavar="NAME", help="agnews, arc, boolq, sst2, mt-bench or a FILE.json.")
    ],
    intervention: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|NAME", help="What to change; 'workbench list interventions'."
        ),
    ] = None,
    settings: given.Settings = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")
    ] = None,
    shots: Annotated[int, typer.Option(metavar="K", help="Solved examples before each.")] = 0,
    examples: Annotated[
        Path | None, typer.Option(metavar="TRAIN.jsonl", help="Where examples are drawn from.")
    ] = None,
    scoring: Annotated[
        str, typer.Option(metavar="S", help="first-token, or loglikelihood of the whole label.")
    ] = "first-token",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of an answer: 5, of mt-bench 64."),
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Questions at once.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="S", help="Of the examples.")] = 0,
    backend: given.Backend = "hf",
    dtype: given.Dtype = "auto",
    device: given.Device = "auto",
    revision: given.Revision = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="One row a question, as .jsonl."),
    ] = None,
    progress: Annotated[str, typer.Option(metavar="P", help="auto, bar, json or off.")] = "auto",
    as_json: given.AsJson = False,
) -> None:
    """Measure accuracy, honestly: what is written, what the labels say, and what cannot be read.

    With an intervention the stock model answers the same questions; intervals are bootstrapped over
    questions, p is McNemar's.

    Example: workbench evaluate --model M --data sst2_test.jsonl --task sst2 --intervention zerotuning
    --set gamma=2
    """
    if intervention is None and settings:
        raise typer.BadParameter("--set needs --intervention FILE.json|NAME")
    if task == "mt-bench" and (shots or examples or scoring != "first-token"):
        raise typer.BadParameter("mt-bench takes no --shots, --examples or --scoring")
    given.check_output(output)
    change = _intervention(intervention, settings)
    chosen = {"backend": backend, "revision": revision, "dtype": dtype, "device": device}
    with reporting(progress) as reporter:
        if task == "mt-bench":
            n_answers = _answer_turns(
                model, data, limit, change, max_new_tokens or 64, output, chosen, reporter
            )
            if as_json:
                print_json({"task": task, "n": n_answers, "path": str(output)})
            return
        from workbench.evaluation.evaluate import evaluate, with_examples
        from workbench.evaluation.scoring import Settings
        from workbench.evaluation.task import find_task, read_questions

        found = find_task(task)
        questions = read_questions(found, data, limit)
        solved = read_questions(found, examples) if examples else []
        if shots or examples:
            questions = with_examples(found, questions, solved, shots, seed)
        how = Settings(
            scoring, given.read_batch_size(batch_size) or 16, max_new_tokens or 5, reporter.progress
        )
        evaluation = evaluate(_load(model, chosen), found, questions, change, how)
    if output is not None:
        _write_rows(output, evaluation.rows())
    print_json(evaluation.document()) if as_json else _show(evaluation)
    if evaluation.seen:
        message(
            f"{evaluation.seen} of the {len(questions)} questions chose this intervention: on them it is "
            "not tested; give others"
        )


def _intervention(name: str | None, settings: list[str] | None) -> Any:
    from workbench.cli.generate import read_intervention

    return None if name is None else read_intervention(name, given.read_settings(settings))


def _load(name: str, chosen: dict[str, Any]) -> Any:
    from workbench.models.load import load

    with given.offering_models(name):
        return load(name, **chosen)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    given.write_output(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    message(f"written: {path}")


def _answer_turns(
    name: str,
    data: Path,
    limit: int | None,
    change: Any,
    max_new_tokens: int,
    output: Path | None,
    chosen: dict[str, Any],
    reporter: Any,
) -> int:
    """Write a file for a judge; returns how many conversations it holds."""
    from contextlib import nullcontext

    from workbench.evaluation.chat import answer_turns, read_turns

    if output is None:
        raise ConfigError("answers for a judge go to a file; add -o ANSWERS.jsonl")
    rows = read_turns(data, limit)
    model = _load(name, chosen)
    with nullcontext() if change is None else model.edit(change):
        label = model.spec.name if change is None else f"{model.spec.name}+intervention"
        answers = answer_turns(
            model, rows, label, max_new_tokens=max_new_tokens, progress=reporter.progress
        )
    _write_rows(output, answers)
    return len(answers)


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
