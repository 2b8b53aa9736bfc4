"""A text as word ids, for the scan-snap experiment on text: the most frequent words, the rest one.

Words are runs of letters and digits, with apostrophes inside, and single marks; lower case.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.builtin import builtin_path
from workbench.errors import DataError

UNKNOWN = "<unk>"
HELD_OUT_SHARE = 0.1
"""Of the text, at its end."""


@dataclass(frozen=True, eq=False)
class Words:
    """A text as word ids, the most frequent first; 0 is every other word."""

    vocabulary: tuple[str, ...]
    train: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]

    def digest(self) -> bytes:
        """SHA-256 of all there is."""
        digest = hashlib.sha256(json.dumps(self.vocabulary).encode())
        digest.update(torch.cat([self.train, self.held_out]).numpy().tobytes())
        return digest.digest()


def read_words(path: str | None, n_words: int, n_pos: int) -> Words:
    """Cut a text into words and marks, lower case.

    Args:
        path: Of a text file; None: the builtin prose.
        n_words: How many ids there are, the one of all other words included.
        n_pos: Words of a prompt; the text must be longer than a few.

    Raises:
        DataError: It cannot be read, or is too short.
    """
    text = _builtin_text() if path is None else _user_text(path)
    words = re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.lower())
    needed = round(2 * (n_pos + 1) / HELD_OUT_SHARE)
    if len(words) < needed:
        raise DataError(
            f"a text must have at least {needed} words for prompts of {n_pos}; got "
            f"{len(words)}; give a longer text or lower n_pos"
        )
    frequent = [word for word, _ in Counter(words).most_common(n_words - 1)]
    ids = {word: index for index, word in enumerate(frequent, start=1)}
    tokens = torch.tensor([ids.get(word, 0) for word in words])
    cut = round(len(words) * (1 - HELD_OUT_SHARE))
    return Words((UNKNOWN, *frequent), tokens[:cut], tokens[cut:])


def _builtin_text() -> str:
    lines = builtin_path("natural").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def _user_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"text must be a readable UTF-8 file; {Path(path).name} is not ({error.args[-1]}); "
            "check the path"
        ) from error


def prompts(
    tokens: Int[Tensor, " n"], n_rows: int, n_pos: int, generator: torch.Generator
) -> Int[Tensor, "row longer"]:
    """Draw stretches of n_pos + 1 words."""
    starts = torch.randint(len(tokens) - n_pos, (n_rows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(n_pos + 1)]
