"""Reads a folder of texts: .txt, .jsonl, .json, .gz and .zip, as plain text by file."""

import fnmatch
import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from workbench.errors import DataError


def read_text_folder(folder: Path, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the text of every .txt, .json and .jsonl file by name, also gzipped or in a .zip.

    Of JSON the strings are taken: a list of them, or of objects (lines, in .jsonl) whose string
    fields other than names and ids are joined.

    Raises:
        DataError: the folder is missing or empty, or a file is not text of one of these kinds.
    """
    if not folder.is_dir():
        raise DataError(
            f"the text must be a folder; {folder} is not one. Give a folder of .txt or .jsonl."
        )
    texts = {}
    for path in sorted(folder.iterdir()):
        wanted = [
            (name, data)
            for name, data in (_unpack(path) if path.is_file() else ())
            if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
        ]
        text = "\n\n".join(plain_text(part) for name, data in wanted for part in _texts(name, data))
        if text.strip():
            texts[path.name] = text
    if not texts:
        raise DataError(
            f"{folder} must hold text; no .txt, .json or .jsonl with any was found. Put some there."
        )
    return texts


def _unpack(path: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of each file in ``path``."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.namelist())
                yield from ((f"{path.name}/{member}", archive.read(member)) for member in members)
        elif path.suffix == ".gz":
            yield path.name.removesuffix(".gz"), gzip.decompress(path.read_bytes())
        else:
            yield path.name, path.read_bytes()
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} must be a whole archive; {error}. Copy it again or exclude it."
        ) from error


def _texts(name: str, data: bytes) -> Iterator[str]:
    if not name.endswith((".txt", ".json", ".jsonl")):
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} must be UTF-8; byte {error.start} is not. Convert or exclude it."
        ) from error
    try:
        if name.endswith(".txt"):
            yield text
        elif name.endswith(".jsonl"):
            yield from (
                _text_of(json.loads(line), name) for line in text.splitlines() if line.strip()
            )
        else:
            whole = json.loads(text)
            entries = whole if isinstance(whole, list) else [whole]
            yield from (_text_of(entry, name) for entry in entries)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} must be JSON; {error}. Mend or exclude it.") from error


def _text_of(entry: object, name: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise DataError(
            f"{name} must hold texts or objects with texts; got {type(entry).__name__}. Exclude it."
        )
    skipped = ("id", "task_id", "entry_point", "test")
    return "\n".join(
        value for key, value in entry.items() if isinstance(value, str) and key not in skipped
    )


def plain_text(text: str) -> str:
    """Undo what corpora do to text: Gutenberg's frame, WikiText's split words and unknown words."""
    text = text.replace("\r\n", "\n")
    begin, end = re.search(r"\*\*\* ?START OF.*\n", text), re.search(r"\*\*\* ?END OF", text)
    text = text[begin.end() if begin else 0 : end.start() if end else None]
    if " <unk> " in text:
        text = "\n".join(_plain_wikitext(line) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _plain_wikitext(line: str) -> str:
    """Join the words of a line again; sentences with a word that is not given are left out."""
    sentences = re.split(
        r"(?<= [.!?] )", line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    )
    line = "".join(sentence for sentence in sentences if "<unk>" not in sentence)
    line = re.sub(r'" ([^"]*) "', r'"\1"', line)
    return re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b)", r"\1", line).replace("( ", "(").strip()
