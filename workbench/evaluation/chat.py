"""Open questions of several turns: answers written to a file for an external judge.

The file has the format of MT-bench answers (FastChat, ``llm_judge``): one JSON object a line with
``question_id``, ``answer_id``, ``model_id``, ``choices: [{index, turns}]`` and ``tstamp``.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import DataError
from workbench.files import read_json_rows
from workbench.models.base import ModelAdapter

NAME = "mt-bench"
PLAIN = "USER: {question}\nASSISTANT:"
"""How a turn looks to a model whose tokenizer has no chat template."""


def read_turns(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read rows ``{question_id, turns: [text, ...]}``; every row is checked.

    Raises:
        DataError: A bad row; its number is told.
    """
    rows, where = read_json_rows(path, limit)
    for row, place in zip(rows, where, strict=True):
        turns = row.get("turns")
        texts = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not texts or not isinstance(row.get("question_id"), int | str):
            raise DataError(
                f"a row of {NAME} must have question_id and turns, a list of texts; {place} has not"
            )
    if not rows:
        raise DataError(f"{path.name} must have at least one row; it is empty")
    return rows


def answer_turns(
    model: ModelAdapter,
    rows: Sequence[Mapping[str, Any]],
    model_id: str,
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Let the model answer every turn, its own earlier answers in view.

    Raises:
        DataError: A conversation that does not fit the model.
    """
    answers = []
    for number, row in enumerate(rows, start=1):
        messages: list[dict[str, str]] = []
        for turn in row["turns"]:
            messages.append({"role": "user", "content": turn})
            prompt = _prompt(model.tokenizer, messages)
            text = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
            messages.append({"role": "assistant", "content": text.strip()})
        turns = [message["content"] for message in messages if message["role"] == "assistant"]
        about = {"question_id": row["question_id"], "model_id": model_id}
        identity = json.dumps([about, turns], sort_keys=True).encode()
        answer_id = hashlib.sha256(identity).hexdigest()[:22]
        answers.append(
            {
                **about,
                "answer_id": answer_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": 0.0,
            }
        )
        progress(number, len(rows))
    return answers


def _prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text
    parts = []
    for message in messages:
        if message["role"] == "user":
            parts.append(PLAIN.format(question=message["content"]))
        else:
            parts[-1] += f" {message['content']}"
    return "\n".join(parts)
