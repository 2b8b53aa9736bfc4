"""Prompts in files: text, JSON lines, safetensors, and data sets of the Hugging Face hub."""

import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.errors import DataError
from workbench.raw_prompts import RawPrompts, from_rows
from workbench.token_ids import split_batch

_KINDS = "a .txt, .jsonl or .safetensors file, builtin:NAME, random, repeat or hf:NAME"


def read_file(path: Path, limit: int | None, *, source: str) -> RawPrompts:
    """Read the prompts of a file; its ending says how (``.txt`` and ``.jsonl`` also ``.gz``).

    Args:
        path: The file.
        limit: Only the first so many prompts.
        source: What to call the data.

    Raises:
        DataError: No such file, an unknown ending, or contents that are not prompts.
    """
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if name.endswith(".safetensors"):
        return _read_safetensors(path, limit, source)
    if plain.endswith(".txt"):
        texts = split_text(_read_text(path, source))[:limit]
        if not texts:
            raise DataError(f"at least one prompt is needed; {source} is empty")
        return RawPrompts(source, texts=tuple(texts), limit=limit)
    if plain.endswith((".jsonl", ".ndjson")):
        rows, where = _read_rows(_read_text(path, source), limit, source)
        return from_rows(rows, source, limit, where)
    hint = "" if path.exists() else '; a prompt itself goes in a list: ["..."]'
    raise DataError(f"data must be {_KINDS}; got {source!r}{hint}")


def read_json_rows(path: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a ``.jsonl`` file, and where each stands (``line 3 of x.jsonl``).

    Raises:
        DataError: No such file, or a line that is not one JSON object.
    """
    return _read_rows(_read_text(path, path.name), limit, path.name)


@contextmanager
def _readable(path: Path, source: str) -> Iterator[None]:
    """Say in our words why a file cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"the data file must exist; there is no {str(path)!r}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"the data file must be readable; {source}: {reason}") from error


def _read_text(path: Path, source: str) -> str:
    with _readable(path, source):
        contents = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            contents = gzip.decompress(contents)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{source} must be gzip; it is damaged or something else") from error
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8; {source} is not at byte {error.start} "
            f"(0x{contents[error.start]:02x}); save it as UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def split_text(text: str) -> list[str]:
    """Cut a text into prompts at blank lines; without any, each line is a prompt."""
    blocks = [block.strip() for block in re.split(r"\n[^\S\n]*(?=\n)", text.strip())]
    if len(blocks) == 1:
        blocks = [line.strip() for line in text.split("\n")]
    return [block for block in blocks if block]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_rows(text: str, limit: int | None, source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Parse JSON lines; blank lines are skipped. Also says where each row stands."""
    rows: list[dict[str, Any]] = []
    where: list[str] = []
    # Not splitlines: a JSON text may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(rows) == limit:
            break
        place = f"line {number} of {source}"
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"each line must be one JSON object; {place}: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"each line must be one JSON object; {place} is a {kind}")
        rows.append(row)
        where.append(place)
    return rows, where


def _read_safetensors(path: Path, limit: int | None, source: str) -> RawPrompts:
    from safetensors import SafetensorError, safe_open  # only this format needs it

    with _readable(path, source), path.open("rb"):
        pass  # safetensors' own words for a missing file are not ours
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if "tokens" not in names:
                found = ", ".join(sorted(names)) or "nothing"
                raise DataError(f"{source} must hold tokens [batch pos]; it holds {found}")
            _check_stored_dtype(file.get_slice("tokens").get_dtype(), source)
            tokens = file.get_tensor("tokens")
            mask = file.get_tensor("attention_mask") if "attention_mask" in names else None
    except SafetensorError as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{source} must be a safetensors file; {reason}") from error
    ids = split_batch(tokens, mask, f"tokens of {source}")
    return RawPrompts(source, ids=ids[:limit], limit=limit)


def _check_stored_dtype(dtype: str, source: str) -> None:
    # Before reading: numpy has no bfloat16 and would fail in its own words.
    if dtype not in ("I64", "I32", "I16", "I8", "U8", "U16", "U32"):
        raise DataError(f"tokens of {source} must be integers (I64); got {dtype}; give token ids")


# Hub


def read_hub(spec: str, limit: int | None) -> RawPrompts:
    """Read ``hf:NAME[/CONFIG][:SPLIT]``; the split is ``train`` unless said.

    ``hf:a/b`` is the data set ``a/b``, or, if there is none, the configuration ``b`` of ``a``.
    With a limit only the first rows are fetched.

    Raises:
        DataError: The package is missing, the hub cannot be reached, or there is no such data.
    """
    name, _, split = spec.removeprefix("hf:").partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"a hub data set is hf:NAME[/CONFIG][:SPLIT]; got {spec!r}")
    choices: list[tuple[str, str | None]] = [(name, None)]
    if len(parts) == 2:
        choices.append((parts[0], parts[1]))
    if len(parts) == 3:
        choices = [("/".join(parts[:2]), parts[2])]
    rows = _load_hub(spec, choices, split or "train", limit)
    return from_rows(rows, spec, limit, [f"row {index} of {spec}" for index in range(len(rows))])


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's retries off stderr; what matters is in the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_hub(
    spec: str, choices: list[tuple[str, str | None]], split: str, limit: int | None
) -> list[dict[str, Any]]:
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise DataError(
            f"{spec} needs the datasets package; it is not installed; pip install datasets"
        ) from error
    # Streaming never reads the local cache, so it is of no use where there is no network.
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    reasons = []
    for name, config in choices:
        try:
            with _quiet_hub():
                found = datasets.load_dataset(name, config, split=split, streaming=streaming)
                return [dict(row) for row in itertools.islice(found, limit)]
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip() or "no reason given").splitlines()[0]
            reasons.append(f"{type(error).__name__}: {first[:200]}")
            if isinstance(error, ConnectionError):
                break  # another spelling of the name will not reach the hub either
    raise DataError(
        f"{spec} must be a data set of the hub or of its local cache; {reasons[0]}; check the name "
        "and the network, or save the texts as .jsonl"
    )
