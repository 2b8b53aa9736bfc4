"""Options that several commands share, and what is read from their texts."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from workbench.errors import ConfigError, ModelError, UnknownNameError

if TYPE_CHECKING:
    from workbench.models.base import ModelAdapter

ModelName = Annotated[
    str,
    typer.Option("--model", "-m", metavar="M", help="A hub id, a local folder, demo or toy:DIR."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeat for more.")
]
Backend = Annotated[str, typer.Option(metavar="B", help="hf, transformer-lens or nnsight.")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="R",
        help="Branch, tag or commit on the hub, or a toy's step; 'run' takes several: A,B,C.",
    ),
]
Dtype = Annotated[
    str, typer.Option(metavar="T", help="auto (the checkpoint's), float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.")]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store; default: $WORKBENCH_HOME, else the platform's user-data folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Progress = Annotated[str, typer.Option(metavar="P", help="auto, bar, json or off.")]


def takes(kind: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Let a command take the fields of a dataclass as its options, and receive one object.

    The fields are annotated as typer wants parameters; their order is that of the help.
    """
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=(
                inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            ),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            command(kind(**given))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {name: hints[name] for name in given_names} | {"return": None}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    given_names = [parameter.name for parameter in parameters]
    return decorate


def read_settings(pairs: Sequence[str] | None, option: str = "--set") -> dict[str, str]:
    """Read ``key=value`` texts; dashes in a key count as underscores, the last one of a key wins.

    Raises:
        BadParameter: A text without a key or without ``=``.
    """
    settings = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{option} takes key=value; got {pair!r}")
        settings[name.strip().replace("-", "_")] = value.strip()
    return settings


def read_data(values: Sequence[str] | None) -> Any:
    """Read ``--data``: one source, or ``NAME=SOURCE`` for each domain (then a dict).

    Raises:
        BadParameter: Several sources without names, or a name twice.
    """
    if not values:
        return None
    named = [re.fullmatch(r"([\w.-]+)=(.+)", value) for value in values]
    # A file may have "=" in its name.
    if len(values) == 1 and (named[0] is None or Path(values[0]).exists()):
        return values[0]
    domains = {match[1]: match[2] for match in named if match}
    if len(domains) < len(values):
        raise typer.BadParameter(
            "several --data must each have a name of their own: --data NAME=FILE --data OTHER=FILE"
        )
    return domains


def read_batch_size(text: str) -> int | None:
    """Read ``auto`` (None) or a number.

    Raises:
        ConfigError: Neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch size must be auto or at least 1; got {text!r}")
    return int(text)


def split_settings(settings: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Part the fields of ``Options`` (read as their type) from the probe's own settings."""
    from workbench.requests import Options
    from workbench.settings import make_config

    names = {field.name for field in dataclasses.fields(Options)} & set(settings)
    own = {name: value for name, value in settings.items() if name not in names}
    texts = {name: settings[name] for name in names}
    if texts.get("batch_size") == "auto":
        texts["batch_size"] = "none"
    options = make_config(Options, texts, "run")
    return {name: getattr(options, name) for name in names}, own


def split_intervention(
    name: str | None, settings: dict[str, str]
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Part ``intervention.KEY`` from the other settings; returns the intervention's content first.

    Raises:
        BadParameter: Settings of an intervention without one.
        DataError: Its file cannot be read.
    """
    from workbench.cli.generate import read_heads
    from workbench.interventions.document import read_document

    mark = "intervention."
    own = {key: value for key, value in settings.items() if not key.startswith(mark)}
    asked = {k.removeprefix(mark): value for k, value in settings.items() if k.startswith(mark)}
    if name is None:
        if asked:
            raise typer.BadParameter(f"--set {mark}{next(iter(asked))} needs --intervention")
        return None, own
    content: dict[str, Any] = read_document(name) if name.endswith(".json") else {"name": name}
    for key, value in asked.items():
        content[key] = read_heads(value) if key == "heads" else value
    return content, own


def offer_nearest(probe: str, settings: Iterable[str]) -> None:
    """Refuse a setting that is neither the probe's nor the run's, offering both kinds.

    Raises:
        UnknownNameError: The probe, or the first setting that does not exist.
    """
    from workbench.discovery import find_probe
    from workbench.requests import Options

    classes = (find_probe(probe).config, Options)
    known = {field.name for kind in classes for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            raise UnknownNameError(f"setting of {probe}", name, known)


@contextmanager
def offering_models(name: str) -> Iterator[None]:
    """Add the nearest model to the error about one that cannot be loaded.

    Raises:
        ModelError: The error of the block, with the offer where there is a near one.
    """
    try:
        yield
    except ModelError as error:
        near = difflib.get_close_matches(name, _models_beside(name), n=1)
        if not near or near[0] == name or Path(name).exists():
            raise
        raise ModelError(f"{error}. Did you mean {near[0]!r}?") from error


def _models_beside(name: str) -> list[str]:
    """``demo`` and the model folders that lie where ``name`` would lie."""
    folder = Path(name).parent
    configs = folder.glob("*/config.json") if folder.is_dir() else ()
    return ["demo", *(str(path.parent) for path in configs)]


def check_output(path: Path | None) -> None:
    """Refuse a place that cannot be written before anything is computed.

    Raises:
        ConfigError: The folder is missing, or the path is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"-o must be a file; {path} is a folder; add a file name")
    if not path.parent.is_dir():
        raise ConfigError(
            f"the folder of -o must exist; there is no {path.parent}; make it, or choose another"
        )


def write_output(path: Path, content: bytes) -> None:
    """Write the file of ``-o``, whole or not at all.

    Raises:
        ConfigError: The place cannot be written.
    """
    from workbench.store.files import replace_file

    try:
        replace_file(path, content)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"-o must be a place that can be written; {path}: {reason}; choose another (no part of "
            "it was written)"
        ) from error


def load_model(
    name: str, backend: str, revision: str | None, dtype: str, device: str
) -> "ModelAdapter":
    """Load the model of a command.

    Raises:
        ModelError: It cannot be loaded; the nearest name is offered.
    """
    from workbench.models.load import load

    with offering_models(name):
        return load(name, backend, revision, dtype, device)
