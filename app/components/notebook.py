"""A notebook that shows a result again, and measures it again where its request is known."""

import json
from pathlib import Path
from typing import Any

from app.components.pickers import data_value
from app.jobs import Job
from workbench.result import SHORT_KEY, Result


def notebook(result: Result, store: Path, job: Job | None) -> bytes:
    """A Jupyter notebook, format 4, not yet executed.

    Args:
        result: What it shows.
        store: Where that lies.
        job: The run that measured it, if it was started from the dashboard.
    """
    title = f"# {result.probe}, result {result.key[:SHORT_KEY]}\n"
    cells = [
        _text(title),
        _code("import workbench as wb\n", f"store = wb.Store({str(store)!r})\n"),
        _code(f"result = store.get({result.key!r})\n", "result"),
        _code("for name, figure in result.figures().items():\n", "    figure.show()"),
        _code("result.to_dataframe()"),
        _text("## What produced it\n"),
        _code("result.config, result.provenance"),
    ]
    if job is not None:
        cells += [
            _text("## Measure it again\n", "With `cache='read'` the stored result would be found."),
            _code(*_run_again(result, job)),
        ]
    document = {
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def _run_again(result: Result, job: Job) -> list[str]:
    about = job.request.about
    source = about.get("data")
    settings = {**about.get("options", {}), **about.get("settings", {})}
    given: dict[str, Any] = {name: _value(value) for name, value in settings.items()}
    lines = ["again = wb.run(\n", f"    {result.probe!r},\n", f"    {about.get('model')!r},\n"]
    lines.append(f"    {data_value(source) if source and source != 'none' else None!r},\n")
    if about.get("intervention"):
        lines.append(f"    intervention={about['intervention']!r},\n")
    lines += [f"    {name}={value!r},\n" for name, value in sorted(given.items())]
    return [*lines, ")\n", f"assert again.key == {result.key!r}\n", "again"]


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(*lines: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": list(lines)}


def _code(*lines: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": list(lines),
    }
