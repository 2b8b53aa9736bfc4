"""What a job tells on stderr: progress as JSON or as steps, and lines for people."""

import os
import re
from pathlib import Path
from typing import Any

from workbench.store.strict_json import object_of

LOG_BYTES = 16_384
"""How much of the end of a log is read."""


def progress_of(log: Path) -> tuple[int, int, str]:
    """(done, total, last message) of a log; 0 of 0 where it tells no progress."""
    done = total = 0
    message = ""
    for line in last_lines(log):
        numbers = numbers_of(line)
        if numbers is None:
            message = message_of(line) or message
        else:
            done, total = numbers
    return done, total, message


_STEP = re.compile(r"step (\d+)/(\d+)")


def numbers_of(line: str) -> tuple[int, int] | None:
    """Progress in a line of a log: ``{"done": 3, "total": 8}`` or ``step 3/8 ...``.

    A line of a sweep tells of a cell, and under "sweep" of the whole, which counts.
    """
    if match := _STEP.match(line):
        return int(match[1]), int(match[2])
    told = _object(line)
    whole = told.get("sweep")
    told = whole if isinstance(whole, dict) else told
    done, total = told.get("done"), told.get("total")
    return (done, total) if isinstance(done, int) and isinstance(total, int) else None


def message_of(line: str) -> str:
    """What a line says to people."""
    told = _object(line)
    return str(told.get("message") or told.get("status") or line.removeprefix("workbench: "))


def _object(line: str) -> dict[str, Any]:
    return object_of(line) if line.startswith("{") else {}


def last_lines(path: Path) -> list[str]:
    """The lines at the end of a log, none of them empty; no lines where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            data = file.read()
    except OSError:
        return []
    return [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
