"""Docstrings and dataclasses as Markdown."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Table = Iterable[Sequence[str]]


def table(titles: Sequence[str], rows: Table) -> str:
    """A table; bars and line breaks in a cell would end it."""
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = (re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def from_docstring(text: str | None) -> str:
    """A docstring as Markdown: formulas stay code, names in double backticks become code.

    What Markdown would read as a mark in running text is escaped; ``Args:`` and its like become
    bold words over lists.
    """
    text = inspect.cleandoc(text or "")
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        first = paragraph.split("\n")[0].strip()
        if first in ("Args:", "Raises:", "Returns:"):
            paragraphs.append(f"**{first.rstrip(':')}**\n\n" + _definitions(paragraph))
        elif paragraph.startswith("    "):
            paragraphs.append(paragraph)
        else:
            paragraphs.append(_prose(paragraph))
    return "\n\n".join(paragraphs)


def _definitions(paragraph: str) -> str:
    body = textwrap.dedent("\n".join(paragraph.split("\n")[1:]))
    items = re.split(r"\n(?=\S)", body)
    lines = []
    for item in items:
        name, _, meaning = item.partition(":")
        lines.append(f"* `{name.strip()}`: {_prose(' '.join(meaning.split()))}")
    return "\n".join(lines)


def _prose(text: str) -> str:
    parts = re.split(r"(``[^`]+``|`[^`]+`|https?://\S+)", text)
    return "".join(
        re.sub(r"^``|``$", "`", part) if index % 2 else _escaped(part)
        for index, part in enumerate(parts)
    )


def _escaped(text: str) -> str:
    # A star that begins a line is a list of the docstring's own.
    text = re.sub(r"(?<!^)(?<!\n)\*", r"\\*", text, flags=re.MULTILINE)
    text = re.sub(r"_(?=\W|$)|(?<=\W)_", r"\\_", text)
    return text.replace("<", "&lt;").replace("[", "\\[")


# Dataclasses


def field_notes(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself throws away."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    notes, last = {}, None
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            last = each.target.id
        elif last and isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            notes[last] = inspect.cleandoc(str(each.value.value))
        else:
            last = None
    return notes


def type_name(annotation: Any) -> str:
    """A type as one writes it; tensors with their shape."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    shape = getattr(annotation, "dim_str", None)
    if shape is not None:
        dtypes = getattr(annotation, "dtypes", ())
        kind = dtypes[0] if len(dtypes) == 1 else type(annotation).__name__
        return f"{kind if isinstance(kind, str) else 'tensor'} [{shape.strip()}]"
    if typing.get_args(annotation) and not isinstance(annotation, type):
        text = re.sub(r"\b(?:typing|collections\.abc|workbench(?:\.\w+)+)\.", "", str(annotation))
    return text.replace("NoneType", "none").replace("None", "none")


def allowed(metadata: Mapping[str, Any]) -> str:
    """Which values a setting may have, in words."""
    if metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    low, high = metadata.get("low"), metadata.get("high")
    strict = metadata.get("exclusive")
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}" + (", ends excluded" if strict else "")
    if low is not None:
        return f"{'above' if strict else 'at least'} {low:g}"
    if high is not None:
        return f"{'below' if strict else 'at most'} {high:g}"
    return ""


def settings_table(config: type) -> str:
    """The settings of a probe, toy or intervention: what to write and what it means."""
    hints, notes = typing.get_type_hints(config), field_notes(config)
    rows = []
    for field in dataclasses.fields(config):
        help_text = field.metadata.get("help") or notes.get(field.name, "")
        rows.append(
            (
                f"`{field.name}`",
                type_name(hints[field.name]).replace("|", "or"),
                _default(field),
                allowed(field.metadata),
                field.metadata.get("unit") or "",
                _prose(help_text),
            )
        )
    titles = ("setting", "type", "default", "allowed", "unit", "meaning")
    return _without_empty(titles, rows)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        made = field.default_factory
        return "required" if made is dataclasses.MISSING else f"`{made()!r}`"
    if field.default is None:
        return "none"
    text = field.default
    if isinstance(text, tuple):
        text = ",".join(map(str, text))
    return f"`{text}`" if str(text) else ""


def _without_empty(titles: Sequence[str], rows: list[tuple[str, ...]]) -> str:
    kept = [index for index, _ in enumerate(titles) if any(row[index] for row in rows)]
    return table([titles[i] for i in kept], [[row[i] for i in kept] for row in rows])


def arrays_table(result: type) -> str:
    """The arrays and numbers that a result keeps."""
    hints, notes = typing.get_type_hints(result), field_notes(result)
    rows = [
        (
            f"`{field.name}`",
            type_name(hints[field.name]).replace("|", "or"),
            _prose(notes.get(field.name, "")),
        )
        for field in dataclasses.fields(result)
        if field.name != "config"
    ]
    return _without_empty(("name", "type, shape", "meaning"), rows)
