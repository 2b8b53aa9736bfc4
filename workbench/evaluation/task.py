r"""Tasks: how a row of data becomes a prompt and its labels. Templates are JSON files.

    {"name": "sst2", "prompt": "Review: {text}\nSentiment:", "labels": [" negative", " positive"],
     "answer": "label"}

``prompt`` takes the row's fields in braces; ``labels`` are continuations of it, or ``"letters"``: one
letter for each of the row's ``choices``, which ``{choices}`` then lists. ``instruction`` (before the
first example) and ``separator`` (between examples) may be absent.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.files import read_json_rows

FOLDER = Path(__file__).parents[1] / "assets" / "tasks"
LETTERS = "letters"
FIELDS = {"name", "about", "prompt", "labels", "answer", "instruction", "separator"}


@dataclass(frozen=True)
class Question:
    """One row, ready for a model."""

    prompt: str
    labels: tuple[str, ...]
    """Continuations of the prompt, one of them right."""
    answer: int
    """Index of the right label."""
    where: str = field(default="", compare=False)
    """Where its row stands, for messages: ``line 3 of test.jsonl``."""
    bare: str = field(default="", compare=False)
    """The prompt without the examples in front of it; empty: there are none."""


@dataclass(frozen=True)
class Task:
    """A template; see the module's docstring."""

    name: str
    prompt: str
    labels: tuple[str, ...] | str
    answer: str
    about: str = ""
    instruction: str = ""
    separator: str = "\n\n"

    def question(self, row: Mapping[str, Any], where: str) -> Question:
        """Fill the template with one row.

        Raises:
            DataError: A field is missing or no right label is named; says where.
        """
        labels = self._labels(row, where)
        fields = {name: row[name] for name in row if name != "choices"}
        if self.labels == LETTERS:
            lines = zip(labels, row["choices"], strict=True)
            fields["choices"] = "\n".join(f"{label.strip()}. {choice}" for label, choice in lines)
        for name in self.placeholders():
            if name not in fields:
                raise DataError(
                    f"a row of {self.name} must have {', '.join(self.placeholders())}; {where} has no "
                    f"{name}; mend the row or the template"
                )
            if not _is_text(fields[name]):
                raise DataError(
                    f"{name} of a row of {self.name} must be a text; {where} has "
                    f"{json.dumps(fields[name])[:60]}; mend the row"
                )
        answer = self._answer(row, labels, where)
        return Question(self.prompt.format(**fields), labels, answer, where)

    def placeholders(self) -> list[str]:
        """The fields that the prompt takes from a row."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]

    def with_examples(self, question: Question, examples: Sequence[Question]) -> Question:
        """Put solved examples and the instruction in front of a question."""
        solved = [shot.prompt + shot.labels[shot.answer] for shot in examples]
        parts = [self.instruction, *solved, question.prompt]
        prompt = self.separator.join(part for part in parts if part)
        return replace(question, prompt=prompt, bare=question.bare or question.prompt)

    def _labels(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        if not isinstance(self.labels, str):
            return self.labels
        choices = row.get("choices")
        listed = isinstance(choices, list) and all(map(_is_text, choices))
        if choices is None or not listed or not 2 <= len(choices) <= len(string.ascii_uppercase):
            raise DataError(
                f"a row of {self.name} must have choices, a list of 2 to 26 texts; {where} has "
                f"{json.dumps(choices)[:60]}; mend the row"
            )
        return tuple(f" {letter}" for letter in string.ascii_uppercase[: len(choices)])

    def _answer(self, row: Mapping[str, Any], labels: Sequence[str], where: str) -> int:
        if self.answer not in row:
            raise DataError(
                f"a row of {self.name} must have {self.answer}; {where} has none; add it"
            )
        found = row[self.answer]
        if isinstance(found, bool):
            found = int(found)
        if isinstance(found, str):
            names = [label.strip().lower() for label in labels]
            found = names.index(found.strip().lower()) if found.strip().lower() in names else found
        if not isinstance(found, int) or not 0 <= found < len(labels):
            raise DataError(
                f"{self.answer} of a row of {self.name} must be 0 ... {len(labels) - 1} or one of "
                f"{', '.join(label.strip() for label in labels)}; {where} has {json.dumps(found)[:60]}; "
                "mend the row"
            )
        return found


def _is_text(value: Any) -> bool:
    """A text, or a number that stands for one; null and lists would be written into the prompt."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def task_names() -> list[str]:
    """The tasks that come with the workbench."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_task(name: str) -> Task:
    """A task that comes with the workbench, or a template of one's own by its path.

    Raises:
        UnknownNameError: Neither.
        ConfigError: The file is no template.
    """
    if name.endswith(".json"):
        return _read(Path(name))
    if name not in task_names():
        raise UnknownNameError("task", name, [*task_names(), "FILE.json"])
    return _read(FOLDER / f"{name}.json")


def _read(path: Path) -> Task:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or "no such file").lower()
        raise ConfigError(f"the task file must be readable; {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the task file must be JSON in UTF-8; {path}: {error}") from error
    return task_from(content, path.name)


def task_from(content: Any, source: str) -> Task:
    """Make a task from the content of a template.

    Raises:
        ConfigError: Says what a template must have and what was found.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"a task file must hold one JSON object; {source} does not")
    unknown = sorted(set(content) - FIELDS)
    if unknown:
        raise ConfigError(f"a task has the fields {', '.join(sorted(FIELDS))}; got {unknown[0]}")
    labels = content.get("labels")
    texts = {key: value for key, value in content.items() if key != "labels"}
    bad = [key for key in ("name", "prompt", "answer") if not isinstance(texts.get(key), str)]
    bad += [key for key, value in texts.items() if not isinstance(value, str)]
    if bad:
        raise ConfigError(f"{bad[0]} of a task must be a text; {source} has {texts.get(bad[0])!r}")
    _check_prompt(texts["prompt"], source)
    return Task(**texts, labels=LETTERS if labels == LETTERS else _label_texts(labels, source))


def _label_texts(labels: Any, source: str) -> tuple[str, ...]:
    is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not is_list or not len(set(labels)) == len(labels) >= 2:
        raise ConfigError(
            f'labels of a task must be two or more different texts, or "letters"; {source} has {labels}'
        )
    return tuple(labels)


def _check_prompt(prompt: str, source: str) -> None:
    try:
        fields = [field for field in string.Formatter().parse(prompt) if field[1] is not None]
    except ValueError as error:
        raise ConfigError(f"the prompt's braces must be closed; {source}: {error}") from error
    # Attribute and index look-ups in a template would reach into Python objects; formats would fail on
    # the row that they do not fit.
    odd = [
        f"{name}{'!' + how if how else ''}{':' + form if form else ''}"
        for _, name, form, how in fields
        if form or how or not re.fullmatch(r"\w+", name or "")
    ]
    if odd or not fields:
        raise ConfigError(
            f"a prompt must take fields as {{name}}; {source} has {{{odd[0] if odd else ''}}}"
        )


def read_questions(task: Task, path: Path, limit: int | None = None) -> list[Question]:
    """Read and check every row before anything runs.

    Raises:
        DataError: A bad row (its number is told), or none at all.
    """
    rows, where = read_json_rows(path, limit)
    if not rows:
        raise DataError(f"{path.name} must have at least one row; it is empty; give another file")
    return [task.question(row, place) for row, place in zip(rows, where, strict=True)]
