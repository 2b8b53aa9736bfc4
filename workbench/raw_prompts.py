"""Prompts as they were found, before any tokenizer, and their hash."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import DataError
from workbench.provenance import canonical_json
from workbench.token_ids import as_ids


@dataclass(frozen=True, eq=False)
class RawPrompts:
    """Prompts as they were found, before any tokenizer; only one of the contents is filled."""

    source: str
    """For people and provenance: the data's name, without the folder it lies in."""
    texts: tuple[str, ...] = ()
    ids: tuple[Any, ...] = ()
    """One int64 numpy array ``[pos]`` a prompt, without padding."""
    generated: str | None = None
    """"random" or "repeat"."""
    domains: dict[str, "RawPrompts"] = field(default_factory=dict)
    rows: tuple[dict[str, Any], ...] = ()
    """The whole rows of a file with columns, one a prompt; empty for plain text."""
    limit: int | None = None
    """How many prompts were asked for."""

    def __len__(self) -> int:
        """Number of prompts found (0 when they are still to be drawn)."""
        return len(self.texts) or len(self.ids) or sum(map(len, self.domains.values()))


def check_text(text: str, where: str) -> None:
    """Refuse a text that has nothing to tokenise.

    Args:
        text: One prompt.
        where: Which one, for the message.
    """
    if not text.strip():
        raise DataError(f"a prompt must not be empty; {where} is; remove it or give it text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a prompt must be valid Unicode; {where} has half a surrogate pair at character "
            f"{error.start}; repair the text"
        ) from error


def from_rows(
    rows: list[dict[str, Any]], source: str, limit: int | None, where: list[str]
) -> RawPrompts:
    """Make prompts of rows: ``text``, ``tokens``, ``question`` with ``choices``, or ``state``.

    A multiple-choice row's prompt is the question and under it the lettered choices.

    Args:
        rows: One mapping a prompt; all columns are kept.
        source: The data's name.
        limit: What was asked for.
        where: Where each row stands, for messages.

    Raises:
        DataError: No rows, rows of several kinds, or values that no JSON holds.
    """
    if not rows:
        raise DataError(f"at least one prompt is needed; {source} has no rows")
    prompts = [_row_prompt(row, place) for row, place in zip(rows, where, strict=True)]
    try:
        canonical_json(rows)
    except (TypeError, ValueError) as error:
        raise DataError(f"rows must hold texts, numbers and lists only; {error}") from error
    if all(isinstance(prompt, str) for prompt in prompts):
        return RawPrompts(source, texts=tuple(prompts), rows=tuple(rows), limit=limit)
    for prompt, place in zip(prompts, where, strict=True):
        if isinstance(prompt, str):
            raise DataError(f"rows must be all texts or all token ids; {place} is a text")
    return RawPrompts(source, ids=tuple(prompts), rows=tuple(rows), limit=limit)


def _row_prompt(row: dict[str, Any], where: str) -> Any:
    if "text" not in row and "choices" in row and "question" in row:
        return _multiple_choice(row, where)
    column = next((name for name in ("text", "tokens", "state") if name in row), None)
    if column is None:
        raise DataError(
            f"a row must have text (or question and choices, or tokens); {where} has "
            f"{', '.join(map(str, row)) or 'nothing'}; rename the column that holds the prompt"
        )
    value = row[column]
    if isinstance(value, str):
        check_text(value, where)
        return value
    if column != "text" and isinstance(value, list | tuple):
        return as_ids(value, where)
    raise DataError(f"{column} must be a text; {where} has {type(value).__name__}")


def _multiple_choice(row: dict[str, Any], where: str) -> str:
    question, choices = row["question"], row["choices"]
    texts = isinstance(choices, list | tuple) and all(isinstance(text, str) for text in choices)
    if not isinstance(question, str) or not choices or not texts:
        raise DataError(f"question must be a text and choices a list of texts; {where} is not so")
    lines = [question, *(f"{chr(65 + index)}. {text}" for index, text in enumerate(choices))]
    check_text(question, where)
    return "\n".join(lines)


def raw_hash(raw: RawPrompts) -> str:
    """SHA-256 of what the prompts are made from; neither file names nor padding count."""
    if raw.domains:
        parts = [[name, raw_hash(part)] for name, part in raw.domains.items()]
        return hashlib.sha256(canonical_json(["domains", parts])).hexdigest()
    if raw.generated:
        return hashlib.sha256(canonical_json([raw.generated, raw.limit])).hexdigest()
    ids = [hashlib.sha256(prompt.astype("<i8").tobytes()).hexdigest() for prompt in raw.ids]
    return hashlib.sha256(canonical_json([raw.texts, ids, raw.rows])).hexdigest()
