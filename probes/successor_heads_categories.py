"""Why a head won a prefix: what the correct token has to do with the tokens it attended to.

The categories, of which the first that applies is taken:

    succession     the correct token follows an attended one in a series
    copying        it is an attended token
    greater-than   it is a larger number, or a later item, than an attended one
    acronym        it is capitals, and an attended word begins with the first of them
    other

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230, section 4; the rules are ours.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.successor_heads_tokens import ROMAN, SERIES, Series

CATEGORIES = ("succession", "copying", "greater-than", "acronym", "other")
LARGEST_ACRONYM = 5


def _places(word: str) -> Iterator[tuple[Series, int]]:
    """Every series and index, from 1, at which a word stands."""
    for series in (*SERIES[1:], ROMAN):
        # A lower-case letter is a word, not an item.
        same = word.casefold() if series.cased else word
        for index, item in enumerate(series.items, start=1):
            if (item.casefold() if series.cased else item) == same:
                yield series, index


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() else None


def is_next(word: str, after: str) -> bool:
    """Whether ``after`` follows ``word`` in a series; any whole numbers count."""
    one, two = _number(word), _number(after)
    if one is not None and two is not None:
        return two == one + 1
    return any(
        series is other and (j == i + 1 or (series.cyclic and j == 1 and i == len(series.items)))
        for series, i in _places(word)
        for other, j in _places(after)
    )


def is_greater(word: str, than: str) -> bool:
    """Whether ``word`` is a larger number, or a later item of a series that does not wrap."""
    one, two = _number(word), _number(than)
    if one is not None and two is not None:
        return one > two
    return any(
        series is other and not series.cyclic and i > j
        for series, i in _places(word)
        for other, j in _places(than)
    )


def is_acronym(word: str, of: str) -> bool:
    """Whether ``word`` is capitals of which the first begins the capitalised word ``of``."""
    short = 0 < len(word) <= LARGEST_ACRONYM
    capitals = word.isalpha() and word.isupper()
    return short and capitals and len(of) > 1 and of[0] == word[0] and of[1:].islower()


def category(correct: str, attended: Sequence[str]) -> str:
    """The first category that applies; words without spaces around them."""
    if any(is_next(word, correct) for word in attended):
        return "succession"
    if any(word and word.casefold() == correct.casefold() for word in attended):
        return "copying"
    if any(is_greater(correct, word) for word in attended):
        return "greater-than"
    if any(is_acronym(correct, word) for word in attended):
        return "acronym"
    return "other"


def categorise(
    tokenizer: Any, correct: Int[Tensor, " case"], seen: Int[Tensor, "case attended"]
) -> Float[Tensor, "judged category"] | None:
    """Shares of the categories by all attended tokens and by the first; None: no case."""
    if not len(correct):
        return None
    counts = torch.zeros(2, len(CATEGORIES))
    for token, attended in zip(correct.tolist(), seen.tolist(), strict=True):
        word = tokenizer.decode([token]).strip()
        others = [tokenizer.decode([one]).strip() for one in attended if one >= 0]
        for row, looked in enumerate((others, others[:1])):
            counts[row, CATEGORIES.index(category(word, looked))] += 1
    return counts / len(correct)
