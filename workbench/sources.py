"""Where prompts come from: a word, a file, a hub data set or a Python object.

Nothing here needs a tokenizer or torch: a cached run reads its prompts only to know whether they
are still the same. Prompts are counted from 0, lines of a file from 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import files
from workbench.builtin import BUILTIN, builtin_path
from workbench.errors import DataError
from workbench.raw_prompts import RawPrompts, check_text, from_rows
from workbench.token_ids import as_array, as_ids, split_batch

GENERATED = ("random", "repeat")
"""Sources that are drawn when the model's vocabulary is known."""

_TOKEN_KEYS = {"tokens", "input_ids", "attention_mask"}


def dataset_names() -> dict[str, str]:
    """What ``--data`` accepts, with one line of help each."""
    return {f"builtin:{name}": holds for name, holds in BUILTIN.items()} | {
        "random": "uniform token ids",
        "repeat": "one token id repeated, another one in each prompt",
        "FILE.txt": "prompts separated by blank lines; without blank lines, one a line",
        "FILE.jsonl": "rows with text; question, choices, answer; or text, label",
        "FILE.safetensors": "tokens [batch pos], optionally attention_mask",
        "hf:NAME[/CONFIG][:SPLIT]": "a data set of the Hugging Face hub with text",
    }


def read_source(data: Any, limit: int | None = None) -> RawPrompts:
    """Read prompts from wherever ``data`` says they are.

    Args:
        data: A text as the command line takes it (see ``dataset_names``), a path, a list of
            texts, of lists of ids or of rows, integer tokens ``[batch pos]`` (torch or numpy),
            a mapping with ``tokens`` or ``input_ids`` and ``attention_mask``, or a mapping of
            domain names to any of these.
        limit: Only the first so many prompts (of each domain).

    Raises:
        DataError: The data is not there, not readable or not prompts.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 prompt; got {limit}")
    if isinstance(data, RawPrompts):
        return data
    if isinstance(data, str | Path):
        return _read_spec(str(data), limit)
    if isinstance(data, Mapping):
        return _read_mapping(data, limit)
    if hasattr(data, "dtype") and hasattr(data, "shape"):
        return RawPrompts("tokens", ids=split_batch(data, None, "tokens")[:limit], limit=limit)
    if isinstance(data, Sequence):
        return _read_sequence(data, limit)
    raise DataError(
        "prompts must be a list of texts, a list of id lists, integer tokens [batch pos] or the "
        f"name of a file; got {type(data).__name__}"
    )


def _read_spec(spec: str, limit: int | None) -> RawPrompts:
    if spec in GENERATED:
        return RawPrompts(spec, generated=spec, limit=limit)
    if spec.startswith("builtin:"):
        path = builtin_path(spec.removeprefix("builtin:"))
        return files.read_file(path, limit, source=spec)
    if spec.startswith("hf:"):
        return files.read_hub(spec, limit)
    return files.read_file(Path(spec), limit, source=Path(spec).name)


def _read_mapping(data: Mapping[str, Any], limit: int | None) -> RawPrompts:
    if not data:
        raise DataError("data must hold at least one domain; got an empty mapping")
    if set(data) <= _TOKEN_KEYS and set(data) != {"attention_mask"}:
        tokens = data["tokens"] if "tokens" in data else data["input_ids"]
        ids = split_batch(as_array(tokens), data.get("attention_mask"), "tokens")
        return RawPrompts("tokens", ids=ids[:limit], limit=limit)
    domains = {str(name): read_source(part, limit) for name, part in data.items()}
    nested = [name for name, part in domains.items() if part.domains]
    if nested:
        raise DataError(f"a domain must be prompts; domain {nested[0]!r} holds domains itself")
    source = ",".join(f"{name}={part.source}" for name, part in domains.items())
    return RawPrompts(source, domains=domains, limit=limit)


def _read_sequence(data: Sequence[Any], limit: int | None) -> RawPrompts:
    items = data[:limit]
    if not items:
        raise DataError("at least one prompt is needed; got an empty list")
    if all(isinstance(item, str) for item in items):
        for index, text in enumerate(items):
            check_text(text, f"prompt {index}")
        return RawPrompts("texts", texts=tuple(items), limit=limit)
    if all(isinstance(item, Mapping) for item in items):
        rows = [dict(item) for item in items]
        return from_rows(rows, "rows", limit, [f"row {index}" for index in range(len(rows))])
    if all(isinstance(item, list | tuple) or hasattr(item, "dtype") for item in items):
        ids = tuple(as_ids(item, f"prompt {index}") for index, item in enumerate(items))
        return RawPrompts("tokens", ids=ids, limit=limit)
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    hint = "; a single prompt of ids goes in a list: [[1, 2, 3]]" if "int" in kinds else ""
    raise DataError(f"prompts must be all texts, all id lists or all rows; got {kinds}{hint}")
