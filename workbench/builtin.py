"""The small prompt files that ship with the package: ``builtin:NAME``."""

from pathlib import Path

from workbench.errors import UnknownNameError

_FOLDER = Path(__file__).parent / "assets" / "prompts"


def builtin_names() -> list[str]:
    """Names of the built-in datasets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.jsonl"))


def builtin_path(name: str) -> Path:
    """Return the file of a built-in dataset.

    Raises:
        UnknownNameError: There is none of that name; the nearest is offered.
    """
    if name not in builtin_names():
        raise UnknownNameError("built-in dataset", name, builtin_names())
    return _FOLDER / f"{name}.jsonl"
