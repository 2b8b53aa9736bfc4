"""The small prompt files that ship with the package: ``builtin:NAME``."""

from pathlib import Path

from workbench.errors import UnknownNameError

_FOLDER = Path(__file__).parent / "assets" / "prompts"

BUILTIN = {
    "code": "short Python programs, over 64 tokens each",
    "items": "short descriptions of two or three things, each named in `items`",
    "natural": "English prose from four centuries, over 64 tokens each",
    "short": "unfinished sentences about well-known facts",
    "succession": "days, months, numbers, letters and ordinals in order",
}
"""What each built-in dataset holds."""


def builtin_path(name: str) -> Path:
    """Return the file of a built-in dataset.

    Raises:
        UnknownNameError: There is none of that name; the nearest is offered.
    """
    if name not in BUILTIN:
        raise UnknownNameError("built-in dataset", name, BUILTIN)
    return _FOLDER / f"{name}.jsonl"
