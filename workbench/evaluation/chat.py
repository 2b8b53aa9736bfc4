"""Open questions of several turns: answers written to a file for an external judge.

The file has the format of MT-bench answers (FastChat, ``llm_judge``): one JSON object a line with
``question_id``, ``answer_id``, ``model_id``, ``choices: [{index, turns}]`` and ``tstamp``.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.errors import CapabilityError, DataError
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
        raise DataError(f"{path.name} must have at least one row; it is empty; give another file")
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
        CapabilityError: The model has no tokenizer.
        DataError: A conversation that does not fit the model; nothing has run then.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CapabilityError(f"answers to texts need a tokenizer; {model.spec.name} has none")
    _check_lengths(model, rows, max_new_tokens)
    answers = []
    for number, row in enumerate(rows, start=1):
        messages: list[dict[str, str]] = []
        for turn in row["turns"]:
            messages.append({"role": "user", "content": turn})
            tokens = torch.tensor([_token_ids(tokenizer, messages)])
            output = model.generate(tokens, max_new_tokens=max_new_tokens, do_sample=False)
            text = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
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


def _check_lengths(
    model: ModelAdapter, rows: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> None:
    """Refuse before the first answer what would not fit at the last turn, all answers full length."""
    n_ctx = model.spec.n_ctx
    for row in rows:
        messages = []
        for turn in row["turns"]:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": ""})
        n_asked = len(_token_ids(model.tokenizer, messages[:-1]))
        longest = n_asked + len(row["turns"]) * max_new_tokens
        if longest > n_ctx:
            raise DataError(
                f"a conversation must fit in n_ctx = {n_ctx} of {model.spec.name}; question "
                f"{row['question_id']} may need {longest} tokens with {max_new_tokens} an answer; lower "
                "--max-new-tokens, or leave it out"
            )


def _token_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    # A chat template writes its special tokens itself; a second BOS would be another prompt.
    special = not getattr(tokenizer, "chat_template", None)
    text = _prompt(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


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
