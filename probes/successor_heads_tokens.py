"""Series whose items have a next one, and which of them a tokenizer keeps in one token.

Eight tasks: numbers 1 to 200, number words, ordinals, days and months with their prefixes, and
letters; days and months wrap around. Every item is looked up in up to four written forms: with and
without a space before it, and (numbers and letters apart) with its first letter's case inverted.
Only an item that is one token in running text counts, and a pair (item, next item) is kept only
where both are. A form is scored on its own: its candidates are the targets of its own pairs.

Roman numerals are held out for the factoring of index and domain.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import DataError


class Series(NamedTuple):
    """Items in order; a cyclic series goes on with its first item after its last."""

    name: str
    items: tuple[str, ...]
    cyclic: bool = False
    cased: bool = True
    """Whether inverting the first letter's case gives another way to write an item."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
SERIES = (
    Series("numbers", tuple(str(number) for number in range(1, 201)), cased=False),
    Series(
        "number words",
        _words(
            "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty"
        ),
    ),
    Series("ordinals", _words("first second third fourth fifth sixth seventh eighth ninth tenth")),
    Series("days", DAYS, cyclic=True),
    Series("day prefixes", tuple(day[:3] for day in DAYS), cyclic=True),
    Series("months", MONTHS, cyclic=True),
    Series("month prefixes", tuple(month[:3] for month in MONTHS), cyclic=True),
    Series("letters", tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), cased=False),
)
ROMAN = Series(
    "Roman numerals",
    _words("I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX"),
    cased=False,
)
FORMS = ("space", "bare", "space, case inverted", "bare, case inverted")
MIN_CANDIDATES = 2
"""With a single candidate every head would be right."""


@dataclass(frozen=True)
class TokenSet:
    """The items of one series that are single tokens in one written form, in order."""

    series: Series
    form: str
    index: tuple[int, ...]
    """Place in the series, counted from 1 and ascending: a number's index is the number."""
    ids: tuple[int, ...]

    def pairs(self) -> Int[Tensor, "pair 2"]:
        """Rows of (source, target): positions within this set, both single tokens."""
        where = {index: row for row, index in enumerate(self.index)}
        length = len(self.series.items)

        def after(index: int) -> int:
            return index % length + 1 if self.series.cyclic else index + 1

        found = [(row, where[after(i)]) for i, row in where.items() if after(i) in where]
        return torch.tensor(found, dtype=torch.long).reshape(-1, 2)

    def words(self) -> tuple[str, ...]:
        """The items as they are written here."""
        return tuple(written(self.series.items[index - 1], self.form) for index in self.index)


def written(item: str, form: str) -> str:
    """An item in one of ``FORMS``."""
    if "inverted" in form:
        item = item[0].swapcase() + item[1:]
    return f" {item}" if form.startswith("space") else item


def single_token(tokenizer: Any, text: str) -> int | None:
    """The token that ``text`` is in running text, or None where it is several or unknown.

    It is looked at after a line break: some tokenizers put a space before a text's first word,
    and then the bare word is no token of its own.
    """
    before, whole = (_encode(tokenizer, part) for part in ("\n", f"\n{text}"))
    if whole[: len(before)] != before:
        before, whole = [], _encode(tokenizer, text)
    rest = whole[len(before) :]
    if len(rest) != 1 or rest[0] == getattr(tokenizer, "unk_token_id", None):
        return None
    return rest[0]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def token_set(tokenizer: Any, series: Series, form: str) -> TokenSet:
    """The single tokens of one series in one form."""
    found = {
        index: token
        for index, item in enumerate(series.items, start=1)
        if (token := single_token(tokenizer, written(item, form))) is not None
    }
    return TokenSet(series, form, tuple(found), tuple(found.values()))


def forms_of(series: Series, forms: str) -> tuple[str, ...]:
    """The written forms that are looked up: ``all`` of them, or ``space`` or ``bare`` alone."""
    several = FORMS if series.cased else FORMS[:2]
    return several if forms == "all" else (forms,)


def without_repeats(later: TokenSet, earlier: list[TokenSet]) -> TokenSet:
    """Leave out items whose token an earlier form has: spaces or case mean nothing there."""
    taken = {token for one in earlier for token in one.ids}
    kept = [
        (i, token) for i, token in zip(later.index, later.ids, strict=True) if token not in taken
    ]
    return TokenSet(
        later.series, later.form, tuple(i for i, _ in kept), tuple(token for _, token in kept)
    )


@dataclass(frozen=True)
class TokenSets:
    """What a tokenizer has of the series."""

    looked_up: tuple[TokenSet, ...]
    """Every series in every form, however few tokens it has."""

    @property
    def scored(self) -> tuple[TokenSet, ...]:
        """Those with enough candidates to be wrong about."""
        return tuple(one for one in self.looked_up if len(one.pairs()) >= MIN_CANDIDATES)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the series that are scored, in the order of ``SERIES``."""
        return tuple(dict.fromkeys(one.series.name for one in self.scored))

    def of(self, task: str) -> tuple[TokenSet, ...]:
        """The scored forms of one series."""
        return tuple(one for one in self.scored if one.series.name == task)

    def fullest(self, task: str) -> TokenSet:
        """The form of one series with most tokens; the first of equals."""
        return max(self.of(task), key=lambda one: len(one.ids))

    def filter_lines(self) -> tuple[str, ...]:
        """What the single-token filter kept, a line per series and form."""
        return tuple(_filter_line(one) for one in self.looked_up)


def _filter_line(one: TokenSet) -> str:
    missing = [
        written(item, one.form).strip()
        for index, item in enumerate(one.series.items, start=1)
        if index not in one.index
    ]
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    line = (
        f"{one.series.name} ({one.form}): {len(one.ids)} of {len(one.series.items)} items, "
        f"{len(one.pairs())} pairs"
    )
    return line + (f"; left out: {shown}" if missing else "")


def find_token_sets(tokenizer: Any, forms: str, model: str) -> TokenSets:
    """Look every series up in a tokenizer.

    Args:
        tokenizer: Of transformers, or anything called like one.
        forms: ``all``, ``space`` or ``bare``.
        model: What to call the model in messages.

    Raises:
        DataError: No series has two pairs of single tokens; the list says what was found.
    """
    found: list[TokenSet] = []
    for series in SERIES:
        own: list[TokenSet] = []
        for form in forms_of(series, forms):
            own.append(without_repeats(token_set(tokenizer, series, form), own))
        found += own
    sets = TokenSets(tuple(found))
    if not sets.scored:
        listed = "; ".join(
            f"{one.series.name} ({one.form}) {len(one.ids)} of {len(one.series.items)}"
            for one in sets.looked_up
        )
        raise DataError(
            f"the tokenizer of {model} must have {MIN_CANDIDATES} successive pairs of at least one "
            f"series as single tokens; it has none: {listed}; use a model with a larger vocabulary"
        )
    return sets
