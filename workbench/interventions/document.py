"""An intervention file as plain data, read without importing what it describes."""

import json
from pathlib import Path
from typing import Any

from workbench.errors import DataError


def read_document(path: str | Path) -> dict[str, Any]:
    """The content of an intervention file.

    Raises:
        DataError: It cannot be read, or is no JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or "no such file").lower()
        raise DataError(f"the intervention file must be readable; {path}: {reason}") from error
    return parse_document(content, str(path))


def parse_document(content: bytes, source: str) -> dict[str, Any]:
    """The same from a file's bytes, wherever they came from.

    Raises:
        DataError: It is no JSON object.
    """
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the intervention file must be JSON in UTF-8; {source}: {error}"
        ) from error
    if not isinstance(parsed, dict):
        raise DataError(f"the intervention file must hold one JSON object; {source} does not")
    return parsed
