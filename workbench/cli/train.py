"""``workbench train``: models small enough to train here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import options as given
from workbench.cli.console import message, print_json
from workbench.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Toy:
    """Something that can be trained."""

    summary: str
    train: Callable[[Mapping[str, str], Path], Path]
    """Settings as texts and an output folder -> the folder of the trained model."""


def _language_model(settings: Mapping[str, str], folder: Path) -> Path:
    from toy_tasks.language_model import LanguageModelConfig, train_language_model
    from workbench.settings import make_config

    own = dict(settings)
    text = own.pop("text", None)
    if text is None:
        raise ConfigError(
            "language-model needs a folder of texts to train on; none was given; "
            "add --set text=FOLDER"
        )
    config = make_config(LanguageModelConfig, own, "language-model")
    return train_language_model(config, Path(text), folder)


TOYS = {
    "language-model": Toy(
        "a small GPT-2 on a folder of texts (text=FOLDER), succession and copying added",
        _language_model,
    )
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
    as_json: given.AsJson = False,
) -> None:
    """Train a small model, or go on training one.

    A run that was stopped goes on from its last checkpoint.

    Example: workbench train language-model --set text=books --set n_steps=2000 -o my-model
    """
    if toy not in TOYS:
        raise UnknownNameError("toy", toy, TOYS)
    folder = TOYS[toy].train(given.read_settings(settings), output)
    if as_json:
        print_json({"toy": toy, "path": folder})
        return
    print(folder)
    message(f"next: workbench run attention-sinks --model toy:{folder} --data builtin:natural")
