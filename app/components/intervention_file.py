"""An intervention from a file that a person brings: a calibration's, or one that was saved here."""

from typing import Any

import pandas as pd
import streamlit as st

from app.components.text import plain
from probes.figures.theme import head_name

KEY = "play file"
_ABOUT = ("name", "version", "layers", "n_heads", "heads", "calibration")


def intervention_file() -> dict[str, Any] | None:
    """The content of an uploaded file, checked and described; None: there is none.

    Raises:
        WorkbenchError: It holds no intervention; says why.
    """
    from workbench.interventions.document import parse_document
    from workbench.interventions.files import from_content

    file = st.file_uploader(
        "Load an intervention file",
        type="json",
        key=KEY,
        help="What 'workbench calibrate' writes, or what was saved here. It takes the place of the form.",
    )
    if file is None:
        return None
    content = parse_document(file.getvalue(), file.name)
    change = from_content(content)
    heads = getattr(change, "heads", None)
    names = "all heads" if heads is None else ", ".join(head_name(*head) for head in heads)
    settings = {key: value for key, value in content.items() if key not in _ABOUT}
    told = ", ".join(f"{key} = {value}" for key, value in settings.items())
    st.caption(
        plain(
            f"{file.name}: {content['name']}, {told}; heads: {names or 'none, so nothing changes'}"
        )
    )
    _table(content.get("calibration"))
    return content


def _table(calibration: Any) -> None:
    """What the calibration measured on its test part, if it says so."""
    table = calibration.get("table") if isinstance(calibration, dict) else None
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        return
    st.caption(plain(f"Its test part of the task {calibration.get('task')}:"))
    rows = {name.replace("_", " "): row for name, row in table.items()}
    st.dataframe(
        pd.DataFrame(rows).map(
            lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
        )
    )
