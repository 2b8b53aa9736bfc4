"""Lists, what heads attend to, and the categories of words, by hand."""

import dataclasses

import pytest
import torch

from probes.successor_heads_attention import list_attention, list_prompts
from probes.successor_heads_categories import (
    categorise,
    category,
    is_acronym,
    is_greater,
    is_next,
)
from probes.successor_heads_text import most_attended, winners
from probes.successor_heads_tokens import find_token_sets, single_token
from tests.probes.planted_successors import WordTokenizer
from workbench.context import Context
from workbench.testing import PlantedModel, uniform_pattern

# Lists and text


def test_lists_of_a_long_series_are_spread_over_it():
    words = [f" {i}" for i in range(1, 67)]
    tokenizer = WordTokenizer(words)
    sets = find_token_sets(tokenizer, "space", "m")
    prompts, item = list_prompts(tokenizer, sets)
    # 64 runs of three, at most 32 of them: every other one, each with its commas.
    assert len(prompts) == 32
    said = [tokenizer.decode(row) for row in prompts.tolist()]
    assert said == [f" {i}, {i + 1}, {i + 2}," for i in range(1, 65, 2)]
    assert item == 4
    tokenizer.ids.pop(",")
    plain, item = list_prompts(tokenizer, sets)
    assert tokenizer.decode(plain[0].tolist()) == " 1 2 3"
    assert item == 2


class WithBos(WordTokenizer):
    """Puts a token before every text; ``said`` is what it says its id is."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_lists_stand_behind_bos_where_the_tokenizer_puts_one():
    days = [" Monday", " Tuesday", " Wednesday", " Thursday"]
    tokenizer = WithBos(days)
    prompts, item = list_prompts(tokenizer, find_token_sets(tokenizer, "space", "m"))
    assert prompts[:, 0].tolist() == [1, 1]
    assert (prompts.shape, item) == ((2, 7), 5)
    tokenizer.bos_token_id = 0  # it has one and puts another
    prompts, item = list_prompts(tokenizer, find_token_sets(tokenizer, "space", "m"))
    assert (prompts.shape, item) == ((2, 6), 4)


def test_lists_are_measured_in_batches_and_need_room():
    tokenizer = WordTokenizer([f" {i}" for i in range(1, 8)])
    sets = find_token_sets(tokenizer, "space", "m")
    pattern = uniform_pattern(6).repeat(8, 2, 1, 1, 1)
    pattern[:, :, :, 5, 4] = torch.arange(16.0).view(8, 2, 1) / 16
    model = PlantedModel(pattern)
    model.tokenizer = tokenizer
    whole = list_attention(model, sets, Context())
    torch.testing.assert_close(whole, pattern[:5, :, :, 5, 4].mean(dim=0))
    model.spec = dataclasses.replace(model.spec, n_ctx=6)
    assert list_attention(model, sets, Context()) is not None
    model.spec = dataclasses.replace(model.spec, n_ctx=5)
    assert list_attention(model, sets, Context()) is None


def test_a_winner_must_be_hurt():
    effect = torch.tensor([[0.1, 0.3], [-0.1, 0.0], [-0.2, -0.1], [0.2, -5.0]])
    assert winners(effect).tolist() == [1, -1, -1, 0]


def test_the_most_attended_keys_of_every_query():
    pattern = torch.tensor([[[1.0, 0, 0], [0.4, 0.6, 0], [0.5, 0.0, 0.5001]]])
    found = most_attended(pattern)[0]
    assert found.tolist() == [[0, -1, -1, -1, -1], [1, 0, -1, -1, -1], [2, 0, -1, -1, -1]]
    row = torch.zeros(1, 7, 7)
    row[0, 6] = torch.tensor([0.05, 0.3, 0.1, 0.2, 0.15, 0.12, 0.08])
    assert most_attended(row)[0, 6].tolist() == [1, 3, 4, 5, 2]


@pytest.mark.parametrize(
    ("word", "after", "follows", "greater"),
    [
        ("7", "8", True, True),
        ("999", "1000", True, True),
        ("7", "9", False, True),
        ("8", "8", False, False),
        ("8", "7", False, False),
        ("Monday", "tuesday", True, False),
        ("Sunday", "Monday", True, False),
        ("Saturday", "Monday", False, False),
        ("ten", "eleven", True, True),
        ("ten", "twelve", False, True),
        ("twenty", "one", False, False),
        ("IX", "X", True, True),
        ("A", "B", True, True),
        ("a", "B", False, False),
        ("A", "C", False, True),
        ("Z", "A", False, False),
        ("seven", "8", False, False),
        ("second", "third", True, True),
        ("May", "Jun", True, False),
    ],
)
def test_what_follows_and_what_is_greater(word, after, follows, greater):
    assert is_next(word, after) == follows
    assert is_greater(after, word) == greater


@pytest.mark.parametrize(
    ("word", "of", "expected"),
    [
        ("NASA", "National", True),
        ("N", "National", True),
        ("ABCDE", "Amber", True),
        ("ABCDEF", "Amber", False),
        ("NASA", "national", False),
        ("NASA", "NATIONAL", False),
        ("NASA", "N", False),
        ("Nasa", "National", False),
        ("NA5A", "National", False),
        ("NASA", "Space", False),
        ("", "Space", False),
    ],
)
def test_acronyms(word, of, expected):
    assert is_acronym(word, of) == expected


def test_the_first_category_that_applies():
    assert category("8", ["7", "8"]) == "succession"
    assert category("8", ["3", "8"]) == "copying"
    assert category("May", ["may"]) == "copying"
    assert category("8", ["9", "3"]) == "greater-than"
    assert category("NASA", ["x", "National"]) == "acronym"
    assert category("x", ["", "y"]) == "other"
    assert category("", [""]) == "other"


def test_unknown_and_split_words_are_no_single_token():
    tokenizer = WordTokenizer([" Monday"])
    assert single_token(tokenizer, " Monday") == 2
    assert single_token(tokenizer, " Mon") is None


def test_shares_of_categories_by_all_and_by_the_most_attended():
    tokenizer = WordTokenizer([" 7", " 8", " 9", " cat", " Cat"])
    seven, eight, nine, cat, capital = (
        tokenizer.ids[f" {w}"] for w in ("7", "8", "9", "cat", "Cat")
    )
    correct = torch.tensor([eight, eight, cat, nine])
    seen = torch.tensor(
        [[seven, nine, -1], [nine, seven, -1], [seven, capital, -1], [seven, -1, eight]]
    )
    found = categorise(tokenizer, correct, seen)
    # By all: succession, succession, copying, succession; by the first: succession, other, other,
    # greater-than.
    assert found.tolist() == [[0.75, 0.25, 0.0, 0.0, 0.0], [0.25, 0.0, 0.25, 0.0, 0.5]]
    assert categorise(tokenizer, correct[:0], seen[:0]) is None
