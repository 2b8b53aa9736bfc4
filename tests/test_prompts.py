"""Tokens, padding and hashes of prompts."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from workbench.errors import ConfigError, DataError
from workbench.models.base import ModelSpec
from workbench.prompts import columns_hash, describe, read_source, tokenise, tokens_hash

WORDS = ["<s>", "<unk>", "a", "b", "c", "d", "e", "f"]
BOS = 0
SHARED = Path(__file__).parents[2] / "shared" / "data"


def tiny_tokenizer(adds_bos=False, bos_token="<s>"):
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos_token, unk_token="<unk>", model_max_length=8
    )


def spec(n_ctx=16, d_vocab=8):
    return ModelSpec(
        name="tiny",
        revision="0",
        family="gpt2",
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        d_model=4,
        d_head=4,
        d_mlp=4,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
    )


def make(data, tokenizer=None, limit=None, model=None, **options):
    return tokenise(read_source(data, limit), tokenizer, model or spec(), **options)


# Padding


def test_shorter_prompts_are_padded_on_the_right_with_zeros():
    prompts = make(["a b c", "d"], tiny_tokenizer())
    assert prompts.tokens.tolist() == [[2, 3, 4], [5, 0, 0]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert prompts.lengths == (3, 1)
    assert prompts.tokens.dtype == prompts.attention_mask.dtype == torch.int64


def test_prompts_of_one_length_have_no_mask():
    prompts = make([[1, 2], [3, 4]])
    assert prompts.attention_mask is None
    assert prompts.lengths == (2, 2)


def test_left_padding_moves_to_the_right():
    tokens = torch.tensor([[7, 7, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    prompts = make({"tokens": tokens, "attention_mask": mask})
    assert prompts.tokens.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert prompts.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


id_lists = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=5)


def padded(ids, left, pad, width):
    tokens, mask = [], []
    for prompt in ids:
        fill = width - len(prompt)
        tokens.append([pad] * fill + prompt if left else prompt + [pad] * fill)
        mask.append([0] * fill + [1] * len(prompt) if left else [1] * len(prompt) + [0] * fill)
    return {"tokens": tokens, "attention_mask": mask}


@settings(deadline=None)
@given(id_lists, st.integers(0, 7), st.integers(0, 3))
def test_hash_does_not_depend_on_side_width_or_id_of_padding(ids, pad, extra):
    width = max(map(len, ids)) + extra
    plain = make(ids)
    for left in (True, False):
        prompts = make(padded(ids, left, pad, width))
        assert torch.equal(prompts.tokens, plain.tokens)
        assert tokens_hash(prompts) == tokens_hash(plain)


@settings(deadline=None)
@given(id_lists, id_lists)
def test_hash_is_equal_only_for_the_same_prompts_in_the_same_order(one, other):
    assert (tokens_hash(make(one)) == tokens_hash(make(other))) == (one == other)


def test_hash_is_the_documented_one():
    ids = b"".join(value.to_bytes(8, "little") for value in (5, 6, 7, 0))
    by_hand = hashlib.sha256(b"[2,2]" + ids + bytes([1, 1, 1, 0])).hexdigest()
    assert tokens_hash(make([[5, 6], [7]])) == by_hand


def test_labels_and_rows_have_a_hash_of_their_own():
    row = {"text": "a b", "items": ["a"]}
    data = [["a b"], [row], [{**row, "items": ["b"]}], {"x": ["a b"]}, {"y": ["a b"]}]
    prompts = [make(item, tiny_tokenizer()) for item in data]
    assert len({tokens_hash(one) for one in prompts}) == 1
    assert len({columns_hash(one) for one in prompts}) == 5
    assert columns_hash(prompts[0]) is None


# BOS


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [
        (False, "auto", [2, 3]),
        (True, "auto", [BOS, 2, 3]),
        (False, "always", [BOS, 2, 3]),
        (True, "always", [BOS, 2, 3]),
        (True, "never", [2, 3]),
        (False, "never", [2, 3]),
    ],
)
def test_bos_is_put_in_front_at_most_once(adds_bos, bos, expected):
    prompts = make(["a b"], tiny_tokenizer(adds_bos), bos=bos)
    assert prompts.tokens.tolist() == [expected]
    assert prompts.bos == bos


@pytest.mark.parametrize(
    ("bos", "expected"),
    [("auto", [[0, 5], [5, 6]]), ("always", [[0, 5, 0], [0, 5, 6]]), ("never", [[5, 0], [5, 6]])],
)
def test_bos_policy_holds_for_given_ids_too(bos, expected):
    prompts = make([[0, 5], [5, 6]], tiny_tokenizer(), bos=bos)
    assert prompts.tokens.tolist() == expected


def test_never_adds_no_special_token_at_the_end_either():
    tokenizer = tiny_tokenizer()
    ending = processors.TemplateProcessing(single="<s> $A f", special_tokens=[("<s>", 0), ("f", 7)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert make(["a"], tokenizer).tokens.tolist() == [[BOS, 2, 7]]
    assert make(["a"], tokenizer, bos="never").tokens.tolist() == [[2]]


def test_bos_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(DataError, match="bos=always needs a tokenizer with a BOS token; that of"):
        make(["a"], tiny_tokenizer(bos_token=None), bos="always")
    with pytest.raises(ConfigError, match="one of auto, always, never; got 'maybe'"):
        make(["a"], tiny_tokenizer(), bos="maybe")


# Lengths


def test_whole_prompts_are_kept_and_a_longer_one_than_the_model_takes_is_refused():
    assert make([[1] * 16]).lengths == (16,)
    message = r"fit into the 16 tokens that tiny takes; prompt 1 of tokens has 17; .*n_pos=16"
    with pytest.raises(DataError, match=message):
        make([[1], [1] * 17])


def test_n_pos_cuts_long_prompts_and_reports_the_short_ones_it_leaves_out():
    said = []
    prompts = make(["a b c d", "a b", "c d e"], tiny_tokenizer(), n_pos=3, report=said.append)
    assert prompts.tokens.tolist() == [[2, 3, 4], [4, 5, 6]]
    assert prompts.texts == ("a b c d", "c d e")
    assert prompts.n_left_out == 1
    assert said == ["1 of 3 prompts have fewer than 3 tokens and are left out"]


def test_shortest_allowed_prompts_are_allowed():
    assert make([[1, 2, 3]], min_pos=3).lengths == (3,)
    assert make([[1, 2, 3]], n_pos=2, min_pos=2).lengths == (2,)


def test_n_pos_lets_prompts_through_that_would_not_fit():
    assert make([[1] * 40], n_pos=16).lengths == (16,)


def test_nothing_is_reported_when_nothing_is_left_out():
    said = []
    make([[1, 2]], n_pos=2, report=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_pos": 5}, DataError, "with n_pos=5 .* the longest of the 2 of tokens has 3; choose"),
        ({"n_pos": 17}, ConfigError, "between 1 and the 16 tokens that tiny takes; got 17"),
        ({"n_pos": 0}, ConfigError, "between 1 and the 16"),
        ({"n_pos": 2, "min_pos": 3}, ConfigError, "n_pos must be at least 3 here; got 2"),
        ({"min_pos": 3}, DataError, "at least 3 tokens here; prompt 1 of tokens has 2"),
    ],
)
def test_impossible_length_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make([[1, 2, 3], [1, 2]], **options)


def test_long_text_makes_no_warning_of_the_tokenizers(caplog, capsys):
    make(["a " * 12], tiny_tokenizer())  # the tokenizer's own limit is 8
    assert "longer than" not in caplog.text + capsys.readouterr().err


# Refusals


@pytest.mark.parametrize("bad", [8, -1])
def test_id_outside_the_vocabulary_is_refused_with_its_place(bad):
    message = f"in 0 to 7, the vocabulary of tiny; prompt 1 of tokens has {bad} at position 2"
    with pytest.raises(DataError, match=message):
        make([[1, 2, 3, 4], [5, 6, bad, bad]])


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"tiny has no tokenizer, .*must be token ids; texts is"):
        make(["a"])


def test_prompt_without_tokens_is_refused():
    with pytest.raises(DataError, match="at least one token; prompt 1 of texts has none"):
        make(["a", "<s>"], tiny_tokenizer(), bos="never")


# Drawn prompts


def test_drawn_prompts_default_to_100_of_64_tokens_or_what_fits():
    assert make("random", model=spec(n_ctx=1024)).tokens.shape == (100, 64)
    assert make("random").tokens.shape == (100, 16)
    assert make("repeat", limit=3, n_pos=5).tokens.shape == (3, 5)


def test_random_ids_cover_the_vocabulary_evenly_and_follow_the_seed():
    first = make("random", limit=500).tokens
    counts = torch.bincount(first.flatten(), minlength=8)
    # 8000 draws over 8 ids: 1000 each, standard deviation 30.
    assert counts.min() > 880
    assert counts.max() < 1120
    assert torch.equal(first, make("random", limit=500, seed=0).tokens)
    assert not torch.equal(first, make("random", limit=500, seed=1).tokens)


def test_repeat_draws_one_id_for_each_prompt():
    tokens = make("repeat", limit=30).tokens
    assert (tokens == tokens[:, :1]).all()
    assert len(tokens[:, 0].unique()) > 3


def test_bos_takes_the_place_of_the_first_drawn_id():
    tokens = make("repeat", tiny_tokenizer(), limit=30, bos="always").tokens
    assert tokens.shape == (30, 16)
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1:] == tokens[:, 1:2]).all()


def test_drawn_prompts_are_long_enough_for_the_probe():
    assert make("random", model=spec(n_ctx=128), min_pos=100).lengths[0] == 100


# Domains, labels, rows


def test_each_prompt_carries_its_domain():
    data = {"prose": ["a b c", "a"], "code": [[1, 2]], "noise": "random"}
    prompts = make(data, tiny_tokenizer(), limit=2, n_pos=2)
    assert prompts.labels == {"domain": ("prose", "code", "noise", "noise")}
    assert prompts.tokens[:2].tolist() == [[2, 3], [1, 2]]
    assert prompts.n_left_out == 1
    assert prompts.texts is None


def test_two_random_domains_differ():
    tokens = make({"x": "random", "y": "random"}, limit=4).tokens
    assert not torch.equal(tokens[:4], tokens[4:])


def test_domain_without_long_enough_prompts_is_named():
    with pytest.raises(DataError, match=r"n_pos=2 .* of tokens \(code\) has 1"):
        make({"prose": [[1, 2]], "code": [[1]]}, n_pos=2)


def test_labels_and_rows_stay_with_the_prompts_that_are_kept():
    rows = [{"text": "a", "label": 0}, {"text": "b c", "label": 1}]
    prompts = make(rows, tiny_tokenizer(), n_pos=2)
    assert prompts.labels == {"label": ("1",)}
    assert prompts.rows == (rows[1],)


def test_description_is_short_and_holds_no_path(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a b c\n\nd")
    prompts = make(path, tiny_tokenizer())
    assert describe(prompts) == {
        "source": "mine.txt",
        "n_prompts": 2,
        "n_left_out": 0,
        "n_pos_min": 1,
        "n_pos_max": 3,
        "bos": "auto",
        "hash": tokens_hash(prompts),
    }


# The whole way


def test_reading_and_hashing_never_import_torch():
    program = (
        "import sys; from workbench import provenance, prompts, revisions;"
        "prompts.raw_hash(prompts.read_source('builtin:short'));"
        "provenance.request_hash(provenance.environment());"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr.strip() == ""


def test_real_tokenizer_reads_the_builtin_prose():
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = make("builtin:natural", tokenizer, model=spec(n_ctx=512, d_vocab=512), n_pos=64)
    assert prompts.tokens.shape == (28, 64)
    assert (prompts.tokens[:, 0] == tokenizer.bos_token_id).all()
    start = prompts.texts[4][:30]
    assert tokenizer.decode(prompts.tokens[4], skip_special_tokens=True).startswith(start)
