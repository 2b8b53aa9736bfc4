"""``workbench generate``: text from a model, stock and under an intervention."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import print_json, print_table
from workbench.errors import ConfigError, DataError, UnknownNameError


def generate_command(
    model: given.ModelName,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")],
    intervention: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|NAME", help="What to change; 'workbench list interventions'."
        ),
    ] = None,
    settings: given.Settings = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="How many tokens at most.")] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the stock model's text beside it.")
    ] = False,
    backend: given.Backend = "hf",
    dtype: given.Dtype = "auto",
    device: given.Device = "auto",
    revision: given.Revision = None,
    as_json: given.AsJson = False,
) -> None:
    """Continue a text greedily, with or without an intervention.

    Heads are given as --set heads=L0H3,L2H1; without heads all are meant.

    Example: workbench generate --model demo --prompt "Monday, Tuesday," --intervention zerotuning
    --set gamma=1.5 --compare
    """
    if intervention is None and (settings or compare):
        raise typer.BadParameter("--set and --compare need --intervention FILE.json|NAME")
    texts = given.read_settings(settings)
    change = None if intervention is None else read_intervention(intervention, texts)
    from workbench.models.load import load

    with given.offering_models(model):
        loaded = load(model, backend, revision, dtype, device)

    def continuation(edit: Any) -> str:
        with nullcontext() if edit is None else loaded.edit(edit):
            text: str = loaded.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        return text

    edited = continuation(change)
    stock = continuation(None) if compare else None
    if as_json:
        about = {"model": loaded.spec.name, "prompt": prompt, "intervention": change}
        print_json({**about, "continuation": edited, **({"stock": stock} if compare else {})})
    elif stock is None:
        print(edited)
    else:
        print_table(("stock", str(intervention)), [(stock, edited)])


def read_intervention(name: str, settings: Mapping[str, str]) -> Any:
    """Make an intervention from a file's path or a name, with settings on top.

    Raises:
        UnknownNameError: Neither a file nor a known name.
        ConfigError: A setting is missing, unknown or out of range.
    """
    from workbench.interventions.files import INTERVENTIONS
    from workbench.settings import make_config

    if name.endswith(".json"):
        return _with_settings(Path(name), settings)
    if name not in INTERVENTIONS:
        raise UnknownNameError("intervention", name, INTERVENTIONS)
    try:
        return make_config(INTERVENTIONS[name], _typed(settings), name)
    except TypeError as error:  # the dataclass names the arguments that are missing
        needed = re.findall(r"'(\w+)'", str(error))
        raise ConfigError(
            f"{name} needs {', '.join(needed)}; add --set {'... --set '.join(needed)}=..."
        ) from error


def _typed(settings: Mapping[str, str]) -> dict[str, Any]:
    return {key: read_heads(value) if key == "heads" else value for key, value in settings.items()}


def _with_settings(path: Path, settings: Mapping[str, str]) -> Any:
    """The content of an intervention file, numbers of ``settings`` in their place."""
    import json

    content = _read(path)
    for key, value in _typed(settings).items():
        try:
            content[key] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            content[key] = value
    return content


def _read(path: Path) -> dict[str, Any]:
    import json

    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or "no such file").lower()
        raise DataError(f"the intervention file must be readable; {path}: {reason}") from error
    except ValueError as error:
        raise DataError(f"the intervention file must be JSON in UTF-8; {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"the intervention file must hold one JSON object; {path} does not")
    return content


def read_heads(text: str) -> tuple[tuple[int, int], ...] | None:
    """Read ``L0H3,L2H1`` (also ``0.3,2.1``); ``all`` is None.

    Raises:
        ConfigError: Something else.
    """
    if text.lower() in ("all", "none"):
        return None
    heads = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*L?(\d+)[H.:](\d+)\s*", part, re.IGNORECASE)
        if match is None:
            raise ConfigError(f"heads must be like L0H3,L2H1 or all; got {part.strip()!r}")
        heads.append((int(match[1]), int(match[2])))
    return tuple(heads)
