"""Text of people and of models, shown as it is."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from workbench.store.strict_json import to_json

_MARKUP = re.compile(r"([!-/:-@\[-`{-~])")
_WORD_JOINER = "\u2060"


def plain(text: str) -> str:
    """Text for places that read Markdown: every mark escaped, no emoji code, no link, one line.

    A colon is followed by an invisible character, because ``:name:`` and ``https:`` are looked for
    after the escapes were taken away.
    """
    escaped = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return escaped.replace("\\:", f"\\:{_WORD_JOINER}")


def moment(created: str | float) -> str:
    """A time of a list, in UTC, to the minute; from text in ISO's form or from Unix time."""
    if not isinstance(created, str):
        created = datetime.fromtimestamp(created, UTC).isoformat()
    return created[:16].replace("T", " ")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if 0 < seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows, ``environment.torch``."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value if isinstance(value, str) else to_json(value)
