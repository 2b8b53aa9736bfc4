"""Series and the single-token filter, on tokenizers whose answer is known."""

import json

import pytest

import workbench as wb
from probes.successor_heads_tokens import (
    FORMS,
    ROMAN,
    SERIES,
    Series,
    TokenSet,
    TokenSets,
    find_token_sets,
    single_token,
    token_set,
    written,
)
from tests.probes.planted_successors import WordTokenizer
from toy_tasks.language_series import CYCLIC
from toy_tasks.language_series import SERIES as TAUGHT
from workbench.errors import DataError
from workbench.models.names import demo_folder

ABC = Series("abc", ("a", "b", "c", "d"))
RING = Series("ring", ("a", "b", "c"), cyclic=True)


def pairs(series, index):
    ids = tuple(range(100, 100 + len(index)))
    found = TokenSet(series, "bare", tuple(index), ids).pairs().tolist()
    return [(series.items[index[a] - 1], series.items[index[b] - 1]) for a, b in found]


def test_the_series_have_the_sizes_of_the_card():
    sizes = {series.name: len(series.items) for series in SERIES}
    assert sizes == {
        "numbers": 200,
        "number words": 20,
        "ordinals": 10,
        "days": 7,
        "day prefixes": 7,
        "months": 12,
        "month prefixes": 12,
        "letters": 26,
    }
    assert {series.name for series in SERIES if series.cyclic} == {
        "days",
        "day prefixes",
        "months",
        "month prefixes",
    }
    assert ROMAN.items[16:] == ("XVII", "XVIII", "XIX", "XX")
    assert all(len(set(series.items)) == len(series.items) for series in (*SERIES, ROMAN))


def test_a_pair_needs_both_of_its_tokens():
    assert pairs(ABC, [1, 2, 3, 4]) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert pairs(ABC, [1, 2, 4]) == [("a", "b")]
    assert pairs(ABC, [2, 4]) == []


def test_only_a_cyclic_series_wraps():
    assert pairs(RING, [1, 2, 3]) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert pairs(RING, [1, 3]) == [("c", "a")]


def test_written_forms():
    assert [written("Monday", form) for form in FORMS] == [" Monday", "Monday", " monday", "monday"]
    assert [written("one", form) for form in FORMS] == [" one", "one", " One", "One"]


def test_letters_and_numbers_have_no_inverted_case():
    sets = find_token_sets(WordTokenizer(["A", "B", "C", "a", "b", "c"]), "all", "m")
    forms = [one.form for one in sets.looked_up if one.series.name == "letters"]
    assert forms == ["space", "bare"]
    assert [one.ids for one in sets.scored] == [(2, 3, 4)]


def test_words_of_several_tokens_are_left_out_and_said():
    words = [f" {day}" for day in ("Monday", "Tuesday", "Wednesday", "Friday", "Saturday")]
    sets = find_token_sets(WordTokenizer(words), "all", "m")
    (days,) = sets.scored
    assert days.index == (1, 2, 3, 5, 6)
    assert len(days.pairs()) == 3
    assert "days (space): 5 of 7 items, 3 pairs; left out: Thursday, Sunday" in sets.filter_lines()


@pytest.mark.parametrize(
    ("n_missing", "said"),
    [(0, ""), (1, "d"), (3, "b, c, d"), (4, "b, c, d, ..."), (5, "b, c, d, ...")],
)
def test_at_most_three_words_that_are_left_out_are_named(n_missing, said):
    series = Series("abc", tuple("abcdefg"))
    missing = {1: "d", 3: "bcd", 4: "bcde", 5: "bcdef"}.get(n_missing, "")
    words = [letter for letter in series.items if letter not in missing]
    (line,) = TokenSets((token_set(WordTokenizer(words), series, "bare"),)).filter_lines()
    assert line.startswith(f"abc (bare): {7 - n_missing} of 7 items")
    assert line.partition("; left out: ")[2] == said


def test_an_unknown_word_is_no_token():
    tokenizer = WordTokenizer([" Monday"])
    assert single_token(tokenizer, " Monday") == 2
    tokenizer.unk_token_id = 2
    assert single_token(tokenizer, " Monday") is None


def test_a_token_counts_for_one_form_only():
    class Stripping(WordTokenizer):
        """As tokenizers of words do: spaces mean nothing."""

        def __call__(self, text, add_special_tokens=True):
            return super().__call__(text.replace(" ", ""), add_special_tokens)

    sets = find_token_sets(Stripping(["A", "B", "C"]), "all", "m")
    counts = {one.form: len(one.ids) for one in sets.looked_up if one.series.name == "letters"}
    assert counts == {"space": 3, "bare": 0}


def test_a_single_candidate_is_not_scored():
    words = [" Monday", " Tuesday", "A", "B", "C"]
    sets = find_token_sets(WordTokenizer(words), "all", "m")
    assert sets.tasks == ("letters",)


def test_a_tokenizer_without_any_series_is_refused_with_the_list():
    with pytest.raises(DataError) as refused:
        find_token_sets(WordTokenizer([" Monday", " Tuesday", "5"]), "all", "little")
    text = str(refused.value)
    assert "\n" not in text
    assert "tokenizer of little must have 2 successive pairs" in text
    assert "numbers (bare) 1 of 200" in text
    assert "days (space) 2 of 7" in text
    assert all(series.name in text for series in SERIES)


@pytest.mark.parametrize(("forms", "kept"), [("space", {"space"}), ("bare", {"bare"})])
def test_one_form_alone(forms, kept):
    words = [*(" A", " B", " C"), *("A", "B", "C")]
    sets = find_token_sets(WordTokenizer(words), forms, "m")
    assert {one.form for one in sets.looked_up} == kept


def test_the_fullest_form_is_the_first_of_equals():
    words = [*(" A", " B", " C"), *("A", "B", "C"), "one", "two", "three", " one", " two"]
    sets = find_token_sets(WordTokenizer([*words, " three", " four"]), "all", "m")
    assert sets.fullest("letters").form == "space"
    assert sets.fullest("number words").index == (1, 2, 3, 4)


def test_the_demo_model_has_every_series_it_was_taught():
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    sets = find_token_sets(wb.load("demo").tokenizer, "space", "demo")
    assert len(sets.tasks) == len(TAUGHT)
    for one, (name, items) in zip(sets.looked_up, TAUGHT.items(), strict=True):
        assert one.series.name == name
        assert one.series.cyclic == (name in CYCLIC)
        words = {word.strip() for word in one.words()}
        assert set(items) <= words


# Tokenizers of strangers


@pytest.fixture
def tokenizers_of_strangers(shared_data):
    from transformers import PreTrainedTokenizerFast

    stories = shared_data / "models" / "stories260K" / "tokenizer.json"
    neox = shared_data / "tokenizers" / "gpt-neox" / "tokenizer.json"
    return {
        path.parent.name: PreTrainedTokenizerFast(tokenizer_file=str(path))
        for path in (stories, neox)
    }


def test_neox_keeps_numbers_and_days(tokenizers_of_strangers, shared_data):
    neox = tokenizers_of_strangers["gpt-neox"]
    vocabulary = json.loads((shared_data / "tokenizers/gpt-neox/tokenizer.json").read_text())
    known = vocabulary["model"]["vocab"]
    sets = find_token_sets(neox, "all", "neox")
    assert set(sets.tasks) == {series.name for series in SERIES}
    for one in sets.looked_up:
        # The vocabulary itself, read without the tokenizer: a space is written so there.
        expected = {
            index: known[text]
            for index, item in enumerate(one.series.items, start=1)
            if (text := written(item, one.form).replace(" ", "\u0120")) in known
        }
        assert dict(zip(one.index, one.ids, strict=True)) == expected, one


def test_a_tokenizer_that_adds_a_space_by_itself(tokenizers_of_strangers):
    # It reads "1" as two tokens, a space and the digit; in running text the digit stands alone.
    stories = tokenizers_of_strangers["stories260K"]
    assert len(stories("1", add_special_tokens=False)["input_ids"]) == 2
    digits = token_set(stories, SERIES[0], "bare")
    assert digits.index == tuple(range(1, 10))
    assert [stories.convert_ids_to_tokens(id_) for id_ in digits.ids] == list("123456789")
    letters = token_set(stories, SERIES[-1], "space")
    assert all(stories.convert_ids_to_tokens(id_).startswith("\u2581") for id_ in letters.ids)
