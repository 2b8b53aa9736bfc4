"""A notebook that shows a result again, and measures it again where its request is known."""

import json
from pathlib import Path
from typing import Any

from app.components.asked import Asked
from workbench.result import SHORT_KEY, Result


def notebook(result: Result, store: Path, asked: Asked | None) -> bytes:
    """A Jupyter notebook, format 4, not yet executed.

    Args:
        result: What it shows.
        store: Where that lies.
        asked: What ``wb.run`` takes to measure it again, where that is known.
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
    if asked is not None:
        cells += [
            _text("## Measure it again\n", "With `store=store` the stored result would be found."),
            _code(*_run_again(result, asked)),
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


def _run_again(result: Result, asked: Asked) -> list[str]:
    lines = ["again = wb.run(\n"]
    lines += [f"    {value!r},\n" for value in (result.probe, asked.model, asked.data)]
    if asked.intervention:
        lines.append(f"    intervention={asked.intervention!r},\n")
    lines += [f"    {name}={_value(value)!r},\n" for name, value in sorted(asked.given.items())]
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
