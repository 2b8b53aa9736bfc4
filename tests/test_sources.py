"""Reading prompts from words, files, the hub and Python objects, without a tokenizer."""

import gzip
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from workbench.builtin import BUILTIN
from workbench.errors import DataError, UnknownNameError
from workbench.files import split_text
from workbench.prompts import dataset_names, raw_hash, read_source


def write(tmp_path, name, contents):
    path = tmp_path / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def write_rows(tmp_path, *rows, name="rows.jsonl"):
    return write(tmp_path, name, "\n".join(json.dumps(row) for row in rows))


def ids(raw):
    return [prompt.tolist() for prompt in raw.ids]


# Text files


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\nstill one\n\ntwo\n", ["one\nstill one", "two"]),
        ("\n\n one \n \t\n\n\ntwo\n\n", ["one", "two"]),
        ("only", ["only"]),
        ("\n\n", []),
    ],
)
def test_blank_lines_part_prompts_and_without_them_each_line_is_one(text, prompts):
    assert split_text(text) == prompts


def test_text_file_survives_windows_newlines_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\r\nline\r\n\r\ntwo\r\n")
    assert read_source(str(path)).texts == ("one\nline", "two")


def test_source_names_the_file_without_its_folder(tmp_path):
    raw = read_source(write(tmp_path, "a.txt", "one"))
    assert raw.source == "a.txt"


def test_gzipped_text_reads_like_the_text(tmp_path):
    plain = write(tmp_path, "a.txt", "one\ntwo")
    packed = write(tmp_path, "a.txt.gz", gzip.compress(b"one\ntwo"))
    assert read_source(packed).texts == read_source(plain).texts


def test_limit_keeps_the_first_prompts(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\nthree")
    assert read_source(path, 2).texts == ("one", "two")
    assert len(read_source(path, 9)) == 3


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"", r"at least one prompt is needed; a\.txt is empty"),
        ("a.txt", b"ab\xffc", r"UTF-8; a\.txt is not at byte 2 \(0xff\)"),
        ("a.txt.gz", b"no gzip", r"must be gzip; it is damaged"),
        ("a.csv", b"a,b", r"must be a \.txt, \.jsonl or \.safetensors.*got 'a\.csv'"),
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"line 2 of a\.jsonl: Expecting"),
        ("a.jsonl", b'["x"]', r"line 1 of a\.jsonl is a list"),
        ("a.jsonl", b'{"text": "x", "y": NaN}', r"line 1 of a\.jsonl: NaN is not JSON"),
        ("a.jsonl", b'\n{"prompt": "x", "n": 1}', r"line 2 of a\.jsonl has prompt, n; rename"),
        ("a.jsonl", b'{"text": 3}', r"text must be a text; line 1 of a\.jsonl has int"),
        ("a.jsonl", b'{"text": " "}', r"must not be empty; line 1 of a\.jsonl is"),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"half a surrogate pair at character 1"),
        ("a.jsonl", b'{"text": "a"}\n{"state": [1]}', r"all texts.*line 1 of a\.jsonl is a text"),
        ("a.jsonl", b'{"question": "q", "choices": "ab"}', r"choices a list of texts; line 1"),
        ("a.safetensors", b"nothing", r"a\.safetensors must be a safetensors file; "),
    ],
)
def test_bad_file_is_refused_with_what_must_hold_and_what_was_found(
    tmp_path, name, contents, message
):
    with pytest.raises(DataError, match=message) as refused:
        read_source(write(tmp_path, name, contents))
    assert "\n" not in str(refused.value)


def test_missing_file_is_refused_and_a_prompt_in_its_place_is_explained(tmp_path):
    for name in ("none.txt", "none.jsonl", "none.safetensors"):
        with pytest.raises(DataError, match="there is no"):
            read_source(tmp_path / name)
    with pytest.raises(DataError, match=r"a prompt itself goes in a list"):
        read_source("Once upon a time")


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"readable; a\.txt: Is a directory"):
        read_source(tmp_path / "a.txt")


# Rows


def test_rows_keep_their_columns(tmp_path):
    row = {"text": "Ann saw Bob", "items": ["Ann", "Bob"]}
    raw = read_source(write_rows(tmp_path, row))
    assert raw.texts == ("Ann saw Bob",)
    assert raw.rows == (row,)


def test_multiple_choice_prompt_shows_lettered_choices(tmp_path):
    row = {"question": "Which is red?", "choices": ["grass", "blood"], "answer": 1}
    assert read_source(write_rows(tmp_path, row)).texts == ("Which is red?\nA. grass\nB. blood",)


def test_rows_of_ids_are_tokens(tmp_path):
    raw = read_source(write_rows(tmp_path, {"tokens": [1, 2]}, {"state": [3], "target": 4}))
    assert ids(raw) == [[1, 2], [3]]
    assert raw.rows[1]["target"] == 4


def test_line_separator_inside_a_json_text_does_not_end_the_row(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "one\u2028line"}')
    assert read_source(path).texts == ("one\u2028line",)


def test_rows_from_python_read_like_rows_of_a_file(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    in_file, in_python = read_source(write_rows(tmp_path, *rows)), read_source(rows)
    assert raw_hash(in_file) == raw_hash(in_python)
    with pytest.raises(DataError, match="rows must hold texts, numbers and lists only"):
        read_source([{"text": "a", "extra": object()}])


# Tokens

LEFT = {"tokens": [[0, 0, 5, 6], [1, 2, 3, 4]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}


def test_safetensors_tokens_lose_their_padding(tmp_path):
    save_file({name: np.array(rows) for name, rows in LEFT.items()}, tmp_path / "a.safetensors")
    raw = read_source(tmp_path / "a.safetensors")
    assert ids(raw) == [[5, 6], [1, 2, 3, 4]]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_tokens_with_a_mask_may_be_lists_arrays_or_tensors(make):
    data = {"input_ids": make(LEFT["tokens"]), "attention_mask": make(LEFT["attention_mask"])}
    assert ids(read_source(data)) == [[5, 6], [1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_narrow_integers_are_widened(dtype):
    raw = read_source(torch.tensor([[1, 2], [3, 4]], dtype=dtype))
    assert ids(raw) == [[1, 2], [3, 4]]
    assert raw.ids[0].dtype == np.int64


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3), r"must be integers \(I64\); got F32"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), r"must be integers \(I64\); got BF16"),
        (torch.zeros(3, dtype=torch.int64), r"shape \[batch pos\]; got \[3\]; add the batch axis"),
        (torch.zeros(0, 3, dtype=torch.int64), r"at least one token; got shape \[0, 3\]"),
    ],
)
def test_stored_tokens_of_wrong_kind_are_refused(tmp_path, tensor, message):
    save_torch({"tokens": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        read_source(tmp_path / "a.safetensors")


def test_safetensors_without_tokens_says_what_it_holds(tmp_path):
    save_file({"ids": np.zeros((1, 1))}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"must hold tokens \[batch pos\]; it holds ids"):
        read_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1]], "prompt 0 has a hole at position 1"),
        ([[0, 0, 0]], "the mask of prompt 0 is all 0"),
        ([[1, 1]], r"must have the tokens' shape; got \[1, 2\] for tokens \[1, 3\]"),
        ([[1, 2, 1]], "must be 0 or 1 everywhere"),
    ],
)
def test_impossible_mask_is_refused(mask, message):
    with pytest.raises(DataError, match=message):
        read_source({"tokens": [[7, 8, 9]], "attention_mask": mask})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one prompt is needed; got an empty list"),
        ({}, "at least one domain"),
        (["a", ""], "must not be empty; prompt 1 is"),
        (["a", [1]], "all texts, all id lists or all rows; got list, str"),
        ([1, 2], r"a single prompt of ids goes in a list: \[\[1, 2, 3\]\]"),
        ([[1], []], "must not be empty; prompt 1 has no ids"),
        ([[1, 2.5]], "whole numbers; prompt 0 has 2.5"),
        ([[True]], "whole numbers; prompt 0 has True"),
        (torch.ones(2, 2), "must be integers .*got float32"),
        (np.ones((2, 2)), "must be integers .*got float64"),
        (np.ones(2, dtype=int), "add the batch axis"),
        ({"tokens": [[1], [2, 3]]}, "rectangular"),
        (7, "got int"),
        ({"a": {"b": ["x"]}}, "domain 'a' holds domains itself"),
    ],
)
def test_python_data_that_is_no_prompts_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        read_source(data)


def test_limit_holds_for_rows_and_tokens_of_every_kind(tmp_path):
    tokens = np.array([[1, 2], [3, 4]])
    save_file({"tokens": tokens}, tmp_path / "a.safetensors")
    for data in (tokens, {"tokens": tokens}, tokens.tolist(), tmp_path / "a.safetensors"):
        assert ids(read_source(data, 1)) == [[1, 2]]
    assert len(read_source(write_rows(tmp_path, {"text": "a"}, {"text": "b"}), 1)) == 1


def test_limit_below_one_is_refused():
    with pytest.raises(DataError, match="limit must be at least 1 prompt; got 0"):
        read_source(["a"], 0)


# Domains, words, hub


def test_domains_are_read_one_by_one_with_their_own_limit():
    raw = read_source({"prose": ["a", "b", "c"], "code": [[1, 2]]}, 2)
    assert raw.domains["prose"].texts == ("a", "b")
    assert ids(raw.domains["code"]) == [[1, 2]]
    assert len(raw) == 3


def test_every_named_dataset_can_be_read():
    for name in [*(f"builtin:{name}" for name in BUILTIN), "random", "repeat"]:
        assert name in dataset_names()
        raw = read_source(name)
        assert raw.source == name
        assert raw.generated or len(raw) >= 12


def test_builtin_rows_state_their_licence():
    for name in BUILTIN:
        rows = read_source(f"builtin:{name}").rows
        assert all(row["source"].endswith(("public domain", "Apache-2.0")) for row in rows)
        assert len({row["text"] for row in rows}) == len(rows)


def test_unknown_builtin_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'natural'"):
        read_source("builtin:natrual")


class _Hub(ModuleType):
    """Stands for the datasets package: one data set, ``lab/tales``, and a note of the calls."""

    def __init__(self, error=None, offline=False):
        super().__init__("datasets")
        self.calls, self.error = [], error
        self.config = SimpleNamespace(HF_HUB_OFFLINE=offline)

    def load_dataset(self, name, config, *, split, streaming):
        self.calls.append((name, config, split, streaming))
        if self.error or name != "tales":
            raise self.error or FileNotFoundError(f"no {name}\nsecond line")
        return iter([{"text": "one"}, {"text": "two"}])


def test_hub_name_may_carry_a_configuration_and_a_split(monkeypatch):
    hub = _Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_source("hf:tales/short:test", 1).texts == ("one",)
    assert hub.calls == [("tales/short", None, "test", True), ("tales", "short", "test", True)]
    assert read_source("hf:tales").texts == ("one", "two")
    assert hub.calls[-1] == ("tales", None, "train", False)


def test_without_network_the_hub_cache_is_read_whole(monkeypatch):
    hub = _Hub(offline=True)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_source("hf:tales", 1).texts == ("one",)
    assert hub.calls == [("tales", None, "train", False)]


@pytest.mark.parametrize(
    ("spec", "module", "message"),
    [
        ("hf:a/b", None, "needs the datasets package"),
        ("hf:a/b", _Hub(), "FileNotFoundError: no a/b; check the name and the network"),
        ("hf:a/b", _Hub(ConnectionError()), "ConnectionError: no reason given; check"),
        ("hf:", _Hub(), r"a hub data set is hf:NAME\[/CONFIG\]\[:SPLIT\]; got 'hf:'"),
        ("hf:a/b/c/d", _Hub(), "a hub data set is"),
    ],
)
def test_hub_that_cannot_help_is_one_line(monkeypatch, spec, module, message):
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(DataError, match=message) as refused:
        read_source(spec)
    assert "\n" not in str(refused.value)


# Hash


def test_raw_hash_follows_the_contents_and_not_the_file_name(tmp_path):
    first, second = write(tmp_path, "a.txt", "one\ntwo"), write(tmp_path, "b.txt", "one\n\ntwo")
    assert raw_hash(read_source(first)) == raw_hash(read_source(second))


@pytest.mark.parametrize(
    "other",
    [["b", "a"], ["a"], ["ab"], [[1]], "random", {"x": ["a", "b"]}, [{"text": "a"}, {"text": "b"}]],
)
def test_raw_hash_tells_prompts_apart(other):
    assert raw_hash(read_source(other)) != raw_hash(read_source(["a", "b"]))


def test_raw_hash_tells_ids_apart():
    hashes = [raw_hash(read_source(ids)) for ids in ([[1, 2]], [[2, 1]], [[1], [2]])]
    assert len(set(hashes)) == 3


def test_raw_hash_counts_the_limit_of_drawn_prompts_and_the_names_of_domains():
    assert raw_hash(read_source("random", 3)) != raw_hash(read_source("random", 4))
    assert raw_hash(read_source("random", 3)) != raw_hash(read_source("repeat", 3))
    assert raw_hash(read_source({"x": ["a"]})) != raw_hash(read_source({"y": ["a"]}))
