"""Series that have a next item, and generated text that asks for it or for a copy.

What stands between two items never tells which item it was, so that no bigram finds the next one:
an attention head has to (Gould et al. 2023, "Successor Heads", arXiv:2312.09230).
"""

import random
import re
from collections import Counter
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

# fmt: off
NUMBER_WORDS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
# fmt: on
SERIES: dict[str, tuple[str, ...]] = {
    "numbers": tuple(str(number) for number in range(1, 101)),
    "number words": NUMBER_WORDS,
    "ordinals": ORDINALS,
    "days": DAYS,
    "day prefixes": tuple(day[:3] for day in DAYS),
    "months": MONTHS,
    "month prefixes": tuple(month[:3] for month in MONTHS),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
"""The series the model is taught, each word a single token after a space."""

CYCLIC = ("days", "day prefixes", "months", "month prefixes")


def series_run(rng: random.Random, name: str, n_items: int, *, backward: bool = False) -> list[str]:
    """Return ``n_items`` successive items, from a random start; only cyclic series wrap."""
    items = SERIES[name]
    if name in CYCLIC:
        start = rng.randrange(len(items))
    else:
        n_items = min(n_items, len(items))
        start = rng.randrange(len(items) - n_items + 1)
    run = [items[(start + offset) % len(items)] for offset in range(n_items)]
    return run[::-1] if backward else run


N_SUCCESSION_SNIPPETS = 45_000
N_COPY_SNIPPETS = 8_000
"""1.8 and 0.7 million tokens: a run sees each snippet a few times only."""

SEPARATORS = (
    ",",
    ";",
    " -",
    " /",
    " and",
    " then",
    ", then",
    ".",
    ":",
    " |",
    " or",
    " to",
    ", and",
    " >",
    "\n",
    ",\n",
)
PAIRS = (
    " after{a} comes{b}.",
    " The{a} comes before the{b}.",
    " from{a} to{b}",
    " between{a} and{b}.",
    "{a}, then{b}.",
    " It was{a} and soon it would be{b}.",
    " Not{a} but{b}.",
    " He said{a} and she said{b}.",
    " If this is{a}, the next is{b}.",
    " either{a} or{b}",
)
ENUMERATED = (
    "{item}.{words}\n",
    "{item}:{words}\n",
    "{item}){words};",
    " chapter{item}:{words}.",
    " on{item}{words},",
)


def succession_snippet(rng: random.Random, words: list[str]) -> str:
    """Return one list or sentence in which items of a series follow each other.

    What stands between two items never tells which item it was, so that the next one can only be
    found by attending back to it.
    """
    name = rng.choice(("numbers", "numbers", "numbers", *SERIES))
    kind = rng.random()
    run = [
        f" {item}"
        for item in series_run(rng, name, rng.randint(3, 12), backward=rng.random() < 0.02)
    ]
    if name in ("numbers", "letters") and rng.random() < 0.15:
        return rng.choice(("\n", "-", ".", ",", "|")).join(item.strip() for item in run)
    if kind < 0.5:
        return rng.choice(SEPARATORS).join(run)
    if kind < 0.7:
        template = rng.choice(PAIRS)
        pairs = (series_run(rng, name, 2) for _ in range(rng.randint(1, 4)))
        return "".join(template.format(a=f" {a}", b=f" {b}") for a, b in pairs)
    template = rng.choice(ENUMERATED)
    return "".join(
        template.format(item=item, words=_words(rng, words, rng.randint(1, 4))) for item in run
    )


def copy_snippet(rng: random.Random, words: list[str]) -> str:
    """Return words said again: a list repeated, or each word echoed."""
    chosen = [_words(rng, words, 1) for _ in range(rng.randint(3, 16))]
    kind = rng.random()
    if kind < 0.6:
        separator = rng.choice(("", "", ",", ";", "\n"))
        return rng.choice(("\n", ".")).join([separator.join(chosen)] * rng.randint(2, 4))
    echo = rng.choice(
        ("{word} ({word})", "{word}:{word},", "{word} ={word};", "{word}, I say{word}!")
    )
    return "".join(echo.format(word=word) for word in chosen)


def _words(rng: random.Random, words: list[str], n_words: int) -> str:
    return "".join(f" {rng.choice(words)}" for _ in range(n_words))


def generated_text(
    snippet: Callable[[random.Random, list[str]], str], natural: str, *, n_snippets: int, seed: int
) -> str:
    """Return snippets with lines of natural text between them."""
    rng = random.Random(seed)
    words = common_words(natural)
    lines = [line for line in natural.split("\n") if 20 < len(line) < 120]
    pieces = []
    for _ in range(n_snippets):
        pieces.append(snippet(rng, words))
        pieces.append(rng.choice(("\n", "\n\n", f"\n{rng.choice(lines or [''])}\n")))
    return "".join(pieces)


def common_words(natural: str, n_words: int = 1000) -> list[str]:
    """Return the commonest words that are no item of a series: filler must not look like one."""
    counts = Counter(re.findall(r"\b[a-z]{3,8}\b", natural))
    taken = {item for series in SERIES.values() for item in series}
    return [word for word, _ in counts.most_common(n_words + len(taken)) if word not in taken][
        :n_words
    ]


BACKCOPY_MARKS = {"~": 1, "^": 2, "@": 4}
"""How far back the token lies that is said again after a mark."""


def backcopy_stream(
    tokens: Int[Tensor, " pos"], marks: dict[int, int], *, mark_share: float, seed: int
) -> Int[Tensor, " marked"]:
    """Return text with marks strewn in, after each of which a token is said again.

    This is the Bigram-Backcopy task (Guo et al. 2024) on natural text: any token may have to be
    copied, but only after a mark, so that the head that copies must be idle everywhere else.

    ``marks`` says, by token of the mark, how many tokens back the copied one lies; ``mark_share``
    is the chance of a mark after a token of the text.
    """
    rng = random.Random(seed)
    marked: list[int] = []
    for token in tokens.tolist():
        marked.append(token)
        if rng.random() < mark_share and len(marked) >= max(marks.values()):
            mark = rng.choice(list(marks))
            marked += [mark, marked[-marks[mark]]]
    return torch.tensor(marked)
