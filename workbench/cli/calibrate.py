"""``workbench calibrate``: choose heads and settings of an intervention for a model and a task."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.card import number_text
from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_table, reporting
from workbench.errors import UnknownNameError

if TYPE_CHECKING:
    from workbench.calibration.settings import Calibrated

METHODS = ("act", "zerotuning")


@dataclass(frozen=True)
class CalibrateRequest:
    """The options of ``workbench calibrate``."""

    method: Annotated[str, typer.Argument(metavar="act|zerotuning", help="What to calibrate.")]
    model: given.ModelName
    data: Annotated[Path, typer.Option(metavar="TRAIN.jsonl", help="Questions; they are parted.")]
    task: Annotated[
        str, typer.Option(metavar="NAME", help="agnews, arc, boolq, sst2 or a FILE.json.")
    ]
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", help="The result.")]
    settings: given.Settings = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")
    ] = None
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Rows at once.")] = "auto"
    seed: Annotated[int, typer.Option(metavar="S", help="Of the parts and the controls.")] = 0
    backend: given.Backend = "hf"
    dtype: given.Dtype = "auto"
    device: given.Device = "auto"
    revision: given.Revision = None
    store: given.StoreFolder = None
    progress: given.Progress = "auto"
    as_json: given.AsJson = False


@given.takes(CalibrateRequest)
def calibrate_command(request: CalibrateRequest) -> None:
    """Choose heads (and gamma) on some questions, test the choice on others, write a file.

    The questions are parted at random: half choose heads, a quarter chooses settings (of act, which has
    none to choose unless take=best, three quarters choose heads), a quarter is for the table of the result,
    beside the uncalibrated model and as many heads drawn at random. A run that was killed goes on where
    it was.

    Example: workbench calibrate zerotuning --model M --data sst2_train.jsonl --task sst2 -o zt.json
    """
    if request.method not in METHODS:
        raise UnknownNameError("calibration", request.method, METHODS)
    given.check_output(request.output)
    config = _config(request.method, given.read_settings(request.settings))
    with reporting(request.progress) as reporter:
        from workbench.calibration.parts import encode_parts, split
        from workbench.calibration.prepared import largest_batch
        from workbench.calibration.settings import Run
        from workbench.evaluation.task import find_task, read_questions
        from workbench.memory import backing_off

        found = find_task(request.task)
        questions = read_questions(found, request.data, request.limit)
        splits = split(questions, request.seed, config.shares)
        loaded = given.load_model(
            request.model, request.backend, request.revision, request.dtype, request.device
        )
        about = {"task": found.name, **_about(questions, request.seed), **splits.about()}
        pieces = _pieces(request.store, loaded, request.method, config, about)

        def attempt(size: int) -> "Calibrated":
            run = Run(size, request.seed, reporter.progress, pieces(size).get_or_compute)
            return _calibrate(request.method, loaded, splits, config, run)

        size = given.read_batch_size(request.batch_size)
        if size is None:
            asked = encode_parts(loaded, splits, validates=bool(config.shares[1])).every()
            size = largest_batch(loaded, asked)
            calibrated = backing_off(size, attempt, len(asked), reporter.message)
        else:
            calibrated = attempt(size)
    document = calibrated.document(loaded.spec, about, config)
    given.write_output(request.output, (json.dumps(document, indent=1) + "\n").encode())
    pieces(None).discard()
    print_json(document) if request.as_json else _show(calibrated)
    if splits.n_repeated:
        message(f"{splits.n_repeated} questions were left out: their prompt had come before")
    _tell_next(request)


def _tell_next(request: CalibrateRequest) -> None:
    message(f"written: {request.output}")
    message(
        f"next: workbench evaluate --model {request.model} --task {request.task} --data TEST.jsonl "
        f"--intervention {request.output}"
    )


def _about(questions: Any, seed: int) -> dict[str, Any]:
    from workbench.calibration.parts import questions_hash

    return {"data": questions_hash(questions), "n": len(questions), "seed": seed}


def _config(method: str, settings: dict[str, str]) -> Any:
    from workbench.calibration.settings import ActCalibration, ZeroTuningCalibration
    from workbench.settings import make_config

    kind = ActCalibration if method == "act" else ZeroTuningCalibration
    return make_config(kind, settings, f"calibrate {method}")


def _calibrate(method: str, model: Any, splits: Any, config: Any, run: Any) -> "Calibrated":
    from workbench.calibration.act import calibrate_act
    from workbench.calibration.zerotuning import calibrate_zerotuning

    if method == "act":
        return calibrate_act(model, splits, config, run)
    return calibrate_zerotuning(model, splits, config, run)


def _pieces(
    store: Path | None, model: Any, method: str, config: Any, about: dict[str, Any]
) -> Callable[[int | None], Any]:
    """Where parts of this very calibration are kept, by batch size."""
    from workbench import __version__
    from workbench.identity import weights_hash
    from workbench.provenance import content_key
    from workbench.store.pieces import Pieces
    from workbench.store.results import Store

    identity = {
        "calibration": method,
        "version": __version__,
        "config": dataclasses.asdict(config),
        "model": model.spec.name,
        "revision": model.spec.revision or weights_hash(model),
        "dtype": model.dtype,
        "backend": model.backend,
        **about,
    }
    path, key = Store(store).path, content_key(identity)
    return lambda size: Pieces(path, key, f"batch_size={size}")


def _show(calibrated: "Calibrated") -> None:
    table = calibrated.table
    rows = [
        (name, *(number_text(float(metrics[name])) for metrics in table.values()))
        for name in next(iter(table.values()))
    ]
    print_table(("test part", *(name.replace("_", " ") for name in table)), rows)
    chosen = ", ".join(f"L{layer}H{head}" for layer, head in calibrated.heads)
    message(f"heads: {chosen or 'none; nothing did better than the uncalibrated model'}")
    message(
        f"settings: {', '.join(f'{name}={value}' for name, value in calibrated.settings.items())}"
    )
    scores = calibrated.scores
    if "dominant" in scores:
        correlation = scores.get("gradient_rank_correlation")
        told = "not measured" if correlation is None else f"{correlation:.2f}"
        message(
            f"dominant type: {scores['dominant']}-effective; rank correlation of the gradient with the "
            f"finite profile over {len(scores['profile'])} heads: {told}"
        )
    saved = calibrated.layer_forwards_naive / max(calibrated.layer_forwards, 1)
    message(f"blocks run: {calibrated.layer_forwards}, {saved:.1f} times fewer than head by head")
