"""Where the items of a prompt stand, and the prompts that are compared with it.

An item is a run of tokens that express one thing (a word, a name of several words). A row of the data
says which: ``{"text": ..., "items": [texts that occur in it, in order]}``; without a tokenizer the
items are lists of token ids, found as sub-sequences.

Every prompt that is compared with the given one has its items at the same absolute positions:

* the empty prompt: the tokenizer's encoding of "" and pads up to the prompt's length;
* an item alone: every other ordinary token is a pad, special tokens (BOS, EOS) stay;
* the prompt without an item: the item's tokens are pads.

Paper: Kaplan et al. 2025, "Follow the Flow", arXiv:2504.01137. Card: information_flow sections 1-3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import DataError

NO_ITEM = -1
"""In ``of_pos``: the token belongs to no item."""


@dataclass(frozen=True)
class Places:
    """Which token of every prompt belongs to which item."""

    of_pos: Int[Tensor, "prompt pos"]
    """Index of the item within its prompt, NO_ITEM elsewhere."""
    most: int
    """Items of the prompt that has the most."""

    def part(self, start: int, n_prompts: int) -> "Places":
        """Those of some prompts in a row."""
        return Places(self.of_pos[start : start + n_prompts], self.most)

    def mask(self) -> Bool[Tensor, "prompt item pos"]:
        """The tokens of every item; False for items that a prompt does not have."""
        return self.of_pos[:, None] == torch.arange(self.most)[:, None]


def find_items(
    rows: Sequence[Mapping[str, Any]],
    tokens: Int[Tensor, "prompt pos"],
    lengths: Int[Tensor, " prompt"],
    tokenizer: Any,
) -> Places:
    """Find the tokens of every row's items.

    Raises:
        DataError: No items, an item that is not in its prompt, or two items in one token.
    """
    if len(rows) != len(tokens):
        raise DataError(
            "information-flow needs rows with text and items, one a prompt; got "
            f"{len(rows)} rows for {len(tokens)} prompts; write a .jsonl with "
            '{"text": "...", "items": ["...", "..."]}, or use builtin:items'
        )
    of_pos = torch.full_like(tokens, NO_ITEM)
    most = 0
    for prompt, row in enumerate(rows):
        ids = tokens[prompt, : int(lengths[prompt])].tolist()
        spans = _spans(row, ids, tokenizer, f"prompt {prompt}")
        for item, span in enumerate(spans):
            taken = of_pos[prompt, span] != NO_ITEM
            if bool(taken.any()):
                raise DataError(
                    f"two items must not share a token; in prompt {prompt} items {item - 1} and "
                    f"{item} do; make one item of them"
                )
            of_pos[prompt, span] = item
        most = max(most, len(spans))
    return Places(of_pos, most)


def _spans(row: Mapping[str, Any], ids: list[int], tokenizer: Any, where: str) -> list[list[int]]:
    items = row.get("items")
    if not isinstance(items, list | tuple) or not items:
        raise DataError(
            f"a row must have items, a list with at least one; {where} has {items!r}; name the words "
            "whose information is to be followed"
        )
    if all(isinstance(item, str) for item in items):
        return _text_spans(str(row.get("text", "")), list(items), ids, tokenizer, where)
    if all(isinstance(item, list | tuple) and item for item in items):
        return _id_spans([list(item) for item in items], ids, where)
    raise DataError(
        f"items must be all texts or all lists of token ids, none of them empty; {where} has {items!r}"
    )


def _text_spans(
    text: str, items: list[str], ids: list[int], tokenizer: Any, where: str
) -> list[list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "items given as texts need a tokenizer that tells where tokens stand in the text (a fast "
            f"one of transformers); {where} has none; give items as lists of token ids"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start = _start_of(encoded["input_ids"], ids, where)
    spans, after = [], 0
    for item in items:
        first = text.find(item, after) if item.strip() else -1
        if first < 0:
            raise DataError(
                f"items must occur in the text, in order; {where} has no {item!r} in "
                f"{text[after:]!r}; correct the row"
            )
        after = first + len(item)
        offsets = enumerate(encoded["offset_mapping"])
        span = [start + index for index, (a, b) in offsets if a < after and b > first and b > a]
        if not span or span[-1] >= len(ids):
            raise DataError(
                f"every item must lie within the prompt's tokens; {item!r} of {where} lies behind "
                f"the {len(ids)} that were kept; raise n_pos or leave it out"
            )
        spans.append(span)
    return spans


def _start_of(own: list[int], ids: list[int], where: str) -> int:
    """How many special tokens stand before the text's own tokens."""
    for start in range(min(len(ids), 4)):
        part = ids[start : start + len(own)]
        if part == own[: len(part)]:
            return start
    raise DataError(
        f"a prompt's tokens must be those of its text; {where} has others; give the items of a "
        "prompt of ids as lists of ids"
    )


def _id_spans(items: list[list[int]], ids: list[int], where: str) -> list[list[int]]:
    spans, after = [], 0
    for item in items:
        size = len(item)
        found = [at for at in range(after, len(ids) - size + 1) if ids[at : at + size] == item]
        if not found:
            raise DataError(
                f"items must occur in the prompt, in order; {where} has no {item} after position "
                f"{after}; correct the row"
            )
        after = found[0] + size
        spans.append(list(range(found[0], after)))
    return spans


# Prompts to compare with


@dataclass(frozen=True)
class Padding:
    """What stands where nothing is said."""

    pad: int
    prefix: tuple[int, ...] = ()
    """The tokenizer's encoding of the empty prompt, without BOS."""
    bos: int | None = None
    special: tuple[int, ...] = ()
    """Tokens that stay when a prompt is emptied (BOS, EOS)."""

    @staticmethod
    def of(tokenizer: Any, pad: int | None, d_vocab: int) -> "Padding":
        """Read it from a tokenizer; without one, no token is special and the pad is 0.

        Raises:
            DataError: A pad outside the vocabulary.
        """
        if tokenizer is None:
            pad, found = 0 if pad is None else pad, Padding(0)
        else:
            candidates = (
                pad,
                tokenizer.pad_token_id,
                tokenizer.eos_token_id,
                tokenizer.unk_token_id,
                0,
            )
            pad = next(int(each) for each in candidates if each is not None)
            prefix = list(tokenizer("")["input_ids"])
            bos = tokenizer.bos_token_id
            if prefix and prefix[0] == bos:
                prefix = prefix[1:]
            unknown = tokenizer.unk_token_id
            special = {int(each) for each in tokenizer.all_special_ids} - {unknown}
            found = Padding(pad, tuple(prefix), bos, tuple(sorted(special)))
        if not 0 <= pad < d_vocab:
            raise DataError(f"pad must be a token id below {d_vocab}; got {pad}")
        return Padding(pad, found.prefix, found.bos, found.special)

    def empty(self, first: int, length: int) -> Int[Tensor, " pos"]:
        """The empty prompt, padded to ``length``; it begins with BOS where the prompt does."""
        begins = (self.bos,) if self.bos is not None and first == self.bos else ()
        ids = [*begins, *self.prefix][:length]
        return torch.tensor([*ids, *[self.pad] * (length - len(ids))])

    def lengthened(
        self, tokens: Int[Tensor, "prompt pos"], lengths: Int[Tensor, " prompt"], size: int
    ) -> Int[Tensor, "prompt size"]:
        """Prompts with pads behind them that are read like tokens, as text-to-image models do."""
        grown = torch.full((tokens.shape[0], size), self.pad)
        width = min(size, tokens.shape[1])
        real = torch.arange(width) < lengths[:, None]
        grown[:, :width] = torch.where(real, tokens[:, :width], self.pad)
        return grown

    def alone(
        self, tokens: Int[Tensor, "row pos"], kept: Bool[Tensor, "row pos"]
    ) -> Int[Tensor, "row pos"]:
        """Pads for everything but the kept tokens and the special ones."""
        special = torch.isin(tokens, torch.tensor(self.special, dtype=tokens.dtype))
        return torch.where(kept | special, tokens, self.pad)

    def without(
        self, tokens: Int[Tensor, "row pos"], removed: Bool[Tensor, "row pos"]
    ) -> Int[Tensor, "row pos"]:
        """Pads for the removed tokens."""
        return torch.where(removed, self.pad, tokens)
