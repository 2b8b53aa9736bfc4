"""``workbench generate``: text from a model, stock and under an intervention."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import print_json, print_table
from workbench.errors import ConfigError, UnknownNameError


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
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many tokens at most.")
    ] = 64,
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
    loaded = given.load_model(model, backend, revision, dtype, device)
    if compare:
        _compare(loaded, prompt, change, str(intervention), max_new_tokens, as_json=as_json)
        return
    with nullcontext() if change is None else loaded.edit(change):
        text: str = loaded.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    if as_json:
        about = {"model": loaded.spec.name, "prompt": prompt, "intervention": change}
        print_json({**about, "continuation": text})
    else:
        print(text)


def _compare(
    model: Any, prompt: str, change: Any, name: str, max_new_tokens: int, *, as_json: bool
) -> None:
    """Both continuations, every token of them under both models, attention to the first token."""
    from workbench.generation import compare_generation

    found = compare_generation(model, prompt, change, max_new_tokens)
    if as_json:
        about = {"model": model.spec.name, "prompt": prompt, "intervention": change}
        texts = {"continuation": found.edited.text, "stock": found.stock.text}
        print_json({**about, **texts, "comparison": found.document()})
        return
    print_table(("stock", name), [(found.stock.text, found.edited.text)])
    for title, path in (("stock", found.stock), (name, found.edited)):
        print(f"\nthe tokens of {title}")
        print_table(
            ("token", "p stock", "edited", "change", "entropy stock", "edited", "change"),
            _token_rows(model, path),
        )
    if found.sink_mass_stock is not None and found.sink_mass_edited is not None:
        print("\nattention to the first token, mean over heads and queries of the prompt")
        masses = zip(found.sink_mass_stock.tolist(), found.sink_mass_edited.tolist(), strict=True)
        rows = [(f"layer {n}", f"{a:.3f}", f"{b:.3f}") for n, (a, b) in enumerate(masses)]
        print_table(("", "stock", "edited"), rows)


def _token_rows(model: Any, path: Any) -> list[tuple[str, ...]]:
    """One row a token: its probability and the entropy around it, before, after and the change."""
    pairs = (
        (path.probability_stock, path.probability_edited),
        (path.entropy_stock, path.entropy_edited),
    )
    rows = []
    for place, token in enumerate(path.tokens.tolist()):
        cells = [repr(model.tokenizer.decode([token]))]
        for stock, edited in pairs:
            before, after = float(stock[place]), float(edited[place])
            cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        rows.append(tuple(cells))
    return rows


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

    from workbench.interventions.document import read_document

    content = read_document(path)
    for key, value in _typed(settings).items():
        try:
            content[key] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            content[key] = value
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
