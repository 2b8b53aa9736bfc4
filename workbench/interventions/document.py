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
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or "no such file").lower()
        raise DataError(f"the intervention file must be readable; {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the intervention file must be JSON in UTF-8; {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"the intervention file must hold one JSON object; {path} does not")
    return content
