"""``workbench train``: models small enough to train here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_metrics
from workbench.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Trained:
    """A finished run that is also a result in the store."""

    folder: Path
    """Of the trained model."""
    key: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Toy:
    """Something that can be trained."""

    summary: str
    train: Callable[..., Path | Trained]
    """Settings as texts and an output folder -> the folder of the trained model; with ``--sink``
    also ``progress``, which is told the figures in the place of the terminal."""


Tell = Callable[[Any], None]
"""Told where a run stands: ``toy_tasks.training.Progress``."""


def _language_model(
    settings: Mapping[str, str], folder: Path, progress: Tell | None = None
) -> Path:
    from toy_tasks.language_config import LanguageModelConfig
    from toy_tasks.language_model import train_language_model
    from toy_tasks.training import report_to_stderr
    from workbench.settings import make_config

    own = dict(settings)
    text = own.pop("text", None)
    if text is None:
        raise ConfigError(
            "language-model needs a folder of texts to train on; none was given; "
            "add --set text=FOLDER"
        )
    config = make_config(LanguageModelConfig, own, "language-model")
    return train_language_model(config, Path(text), folder, progress=progress or report_to_stderr)


def recorded(
    name: str,
    settings: Mapping[str, str],
    folder: Path,
    store: Path | None = None,
    progress: Tell | None = None,
) -> Trained:
    """Train a registered toy task, and keep its record and its model in the store.

    Args:
        name: Of the toy task.
        settings: As texts.
        folder: Of the run; one that is finished is not trained again.
        store: Where the record goes; None: the default store.
        progress: Told where the run stands; None: the terminal is.
    """
    import time

    from toy_tasks.training import report_to_stderr
    from workbench.discovery import find_probe
    from workbench.provenance import content_key, environment
    from workbench.result import Result
    from workbench.settings import make_config
    from workbench.store.results import Store

    task = find_probe(name)
    config = make_config(task.config, settings, name)
    _make_folder(folder)
    start = time.perf_counter()
    measured = task.measure(config, folder, progress or report_to_stderr)
    identity: dict[str, Any] = {
        "probe": name,
        "version": task.version,
        "config": asdict(measured.config),
        "data": measured.data_hash() if hasattr(measured, "data_hash") else None,
    }
    provenance = identity | {
        "model": name,
        "environment": environment(),
        "device": "cpu",
        "seconds": round(time.perf_counter() - start, 3),
    }
    result = Result.from_measurement(
        task, measured, key=content_key(identity), provenance=provenance
    )
    if (folder / "model.safetensors").is_file():  # a sweep keeps no model
        _save_for_transformers(folder)
    Store(store).publish(result, files=_kept_files(folder))
    return Trained(folder, result.key, result.metrics())


_KEPT = ("model.safetensors", "config.json", "metrics.jsonl", "sample.safetensors")
"""Files of a run that lie beside its result, so that the result's folder is a ``toy:DIR`` too."""


def _kept_files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in _KEPT if (folder / name).is_file()}


def _save_for_transformers(folder: Path) -> None:
    """Write DIR/transformers where an architecture computes what the toy does; else say why not."""
    from workbench.errors import CapabilityError
    from workbench.models.toy_export import write_transformers

    try:
        write_transformers(folder)
    except CapabilityError as error:
        message(f"not written for transformers: {error}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"-o must be a folder that can be made; {folder}: {(error.strerror or '').lower()}; "
            "choose another"
        ) from error


TOYS = {
    "bigram-backcopy": Toy(
        "a small transformer that copies after triggers, the growth of its attention sink on record",
        partial(recorded, "bigram-backcopy"),
    ),
    "language-model": Toy(
        "a small GPT-2 on a folder of texts (text=FOLDER), succession and copying added",
        _language_model,
    ),
    "scan-snap": Toy(
        "one attention layer on classes of common and distinct tokens; its record goes to the store",
        partial(recorded, "scan-snap"),
    ),
    "scan-snap-sweep": Toy(
        "panels of scan-snap runs over learning rates and seeds, each panel as one batch",
        partial(recorded, "scan-snap-sweep"),
    ),
    "scan-snap-text": Toy(
        "a transformer on words of a text by plain SGD, its attention growing sparse on record",
        partial(recorded, "scan-snap-text"),
    ),
    "state-space": Toy(
        "a selective state-space stack with and without its two refinements, side by side",
        partial(recorded, "state-space"),
    ),
}
"""What can be trained, by name."""


def train_command(
    toy: Annotated[
        str, typer.Argument(metavar="TOY", help="Its name; 'workbench list tasks' has them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of checkpoints and model.")
    ],
    settings: given.Settings = None,
    sink: Annotated[
        str | None,
        typer.Option(metavar="S", help="Send the figures to tensorboard or wandb as well."),
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Train a small model, or go on training one.

    A run that was stopped goes on from its last checkpoint.

    Example: workbench train language-model --set text=books --set n_steps=2000 -o my-model
    """
    if toy not in TOYS:
        raise UnknownNameError("toy", toy, TOYS)
    done = _train(toy, given.read_settings(settings), output, sink)
    folder = done.folder if isinstance(done, Trained) else done
    stored = {"key": done.key, "metrics": done.metrics} if isinstance(done, Trained) else {}
    if as_json:
        print_json({"toy": toy, "path": folder, **stored})
        return
    print(folder)
    if isinstance(done, Trained):
        print_metrics(done.metrics)
        message(f"next: workbench results show {done.key[:12]}")
        if (folder / "sample.safetensors").is_file():
            sample = f"--model toy:{folder} --data {folder / 'sample.safetensors'}"
            message(f"next: workbench run attention-sinks {sample}")
        return
    message(f"next: workbench run attention-sinks --model toy:{folder} --data builtin:natural")


def _train(toy: str, settings: Mapping[str, str], output: Path, sink: str | None) -> Path | Trained:
    if sink is None:
        return TOYS[toy].train(settings, output)
    from toy_tasks.training import report_to_stderr
    from toy_tasks.training_sinks import open_sink

    _make_folder(output)
    with open_sink(sink, toy, output, dict(settings)) as tell:

        def both(progress: Any) -> None:
            report_to_stderr(progress)
            tell(progress)

        return TOYS[toy].train(settings, output, progress=both)
