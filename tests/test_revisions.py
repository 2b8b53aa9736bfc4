"""Hashes of model folders and tokenizers, commits of hub ids."""

import json
import os
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from workbench import revisions
from workbench.errors import ModelError
from workbench.revisions import file_hash, folder_revision, resolve_hub_revision, tokenizer_hash

SHARED = Path(__file__).parents[2] / "shared" / "data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _empty_memory(monkeypatch):
    monkeypatch.setattr(revisions, "_hashes", {})


def model_folder(home, config=None, weights=b"weights", name="model.safetensors"):
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(config or {"model_type": "gpt2"}))
    if weights is not None:
        (home / name).write_bytes(weights)
    return home


def sharded_folder(home, shards):
    model_folder(home, weights=None)
    for name in shards:
        (home / name).write_bytes(name.encode())
    index = {"weight_map": {f"layer{i}": name for i, name in enumerate(shards)}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    return home


# Model folders


def test_revision_follows_weights_and_config_and_not_the_folder(tmp_path):
    one, copy = model_folder(tmp_path / "one"), model_folder(tmp_path / "copy")
    assert folder_revision(one) == folder_revision(copy)
    other_weights = model_folder(tmp_path / "weights", weights=b"Weights")
    other_config = model_folder(tmp_path / "config", {"model_type": "llama"})
    revised = {folder_revision(home) for home in (one, other_weights, other_config)}
    assert len(revised) == 3


def test_revision_counts_every_shard_of_the_index_and_nothing_else(tmp_path):
    home = sharded_folder(tmp_path / "m", ["b.safetensors", "a.safetensors", "b.safetensors"])
    before = folder_revision(home)
    assert [path.name for path in revisions.weight_files(home)] == [
        "b.safetensors",
        "a.safetensors",
    ]
    (home / "consolidated.safetensors").write_bytes(b"the same again")
    assert folder_revision(home) == before
    (home / "a.safetensors").write_bytes(b"longer than before")
    assert folder_revision(home) != before


def test_generation_settings_are_part_of_the_revision(tmp_path):
    home = model_folder(tmp_path / "m")
    before = folder_revision(home)
    (home / "generation_config.json").write_text('{"temperature": 0.5}')
    assert folder_revision(home) != before


def pickled(home):
    model_folder(home, weights=b"x", name="pytorch_model.bin")


def without_weights(home):
    model_folder(home, weights=None)


def without_config(home):
    home.mkdir()


def broken_config(home):
    model_folder(home)
    (home / "config.json").write_text("{")


def listed_config(home):
    model_folder(home)
    (home / "config.json").write_text("[]")


def missing_shard(home):
    sharded_folder(home, ["a.safetensors", "b.safetensors"])
    (home / "b.safetensors").unlink()


def outside_shard(home):
    sharded_folder(home, ["a.safetensors"])
    (home.parent / "a.safetensors").write_bytes(b"elsewhere")
    index = {"weight_map": {"x": "../a.safetensors"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(home):
    sharded_folder(home, ["a.safetensors"])
    (home / "model.safetensors.index.json").write_text("[]")


def empty_index(home):
    sharded_folder(home, [])


def remote_code(home):
    model_folder(home, {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "m.Novel"}})


def remote_code_over_a_known_type(home):
    auto_map = {"AutoModelForCausalLM": "modeling.GPT2Secret"}
    model_folder(home, {"model_type": "gpt2", "auto_map": auto_map})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled, r"only pickled ones \(pytorch_model\.bin\).*save_pretrained\(safe_serial"),
        (without_weights, r"must have weights \(\*\.safetensors\); .* has none"),
        (without_config, r"must have config\.json; .* has none; give the folder"),
        (broken_config, r"must be readable JSON"),
        (listed_config, r"must be a JSON object"),
        (missing_shard, r"b\.safetensors is missing from .*; fetch it again"),
        (outside_shard, r"must be in the folder"),
        (broken_index, r"must have a weight_map; it is damaged"),
        (empty_index, r"must name at least one shard"),
        (remote_code, r"its own code \(Novel in auto_map\), which the workbench never runs"),
        (remote_code_over_a_known_type, r"\(GPT2Secret in auto_map\)"),
        (lambda home: None, r"there is no folder"),
    ],
)
def test_folder_that_is_no_usable_model_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "m")
    with pytest.raises(ModelError, match=message) as refused:
        folder_revision(tmp_path / "m")
    assert "\n" not in str(refused.value)


def test_old_copies_of_native_classes_are_no_remote_code(tmp_path):
    auto_map = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "someone/repository--modeling_phi3.Phi3ForCausalLM",
    }
    home = model_folder(tmp_path / "m", {"model_type": "phi3", "auto_map": auto_map})
    assert folder_revision(home)


def test_shared_model_folder_has_a_revision():
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside the repository")
    assert len(folder_revision(folder)) == 64


# File hashes


def old_file(path, contents, age=60):
    path.write_bytes(contents)
    moment = time.time_ns() - age * 10**9
    os.utime(path, ns=(moment, moment))
    return moment


def test_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "w", tmp_path / "cache"
    old_file(path, b"one")
    first = file_hash(path, cache)
    monkeypatch.setattr(revisions.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert file_hash(path) == first
    revisions._hashes.clear()
    assert file_hash(path, cache) == first


def test_changed_file_is_read_again(tmp_path):
    path, cache = tmp_path / "w", tmp_path / "cache"
    old_file(path, b"one")
    first = file_hash(path, cache)
    old_file(path, b"two", age=50)
    assert file_hash(path, cache) != first


def test_file_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "_CLOCK_TICK_NS", 10**12)  # however slow the machine is
    path, cache = tmp_path / "w", tmp_path / "cache"
    path.write_bytes(b"one")
    first = file_hash(path, cache)
    moment = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(moment, moment))
    assert file_hash(path, cache) != first


@pytest.mark.parametrize(
    "damage", [b"", b"00", b"\xff\xfe", b"a b c", b"0" * 64 + b" " + b"0" * 64]
)
def test_damaged_note_costs_a_second_reading_only(tmp_path, damage):
    path, cache = tmp_path / "w", tmp_path / "cache"
    old_file(path, b"one")
    first = file_hash(path, cache)
    (note,) = cache.iterdir()
    note.write_bytes(damage)
    revisions._hashes.clear()
    assert file_hash(path, cache) == first
    assert first.encode() in note.read_bytes()


def test_cache_that_cannot_be_written_is_no_error(tmp_path):
    path, cache = tmp_path / "w", tmp_path / "cache"
    old_file(path, b"one")
    cache.write_text("a file where the folder should be")
    assert file_hash(path, cache) == file_hash(path)


def test_notes_do_not_tell_the_path(tmp_path):
    old_file(tmp_path / "secret_name", b"one")
    file_hash(tmp_path / "secret_name", tmp_path / "cache")
    (note,) = (tmp_path / "cache").iterdir()
    assert "secret" not in note.name + note.read_text()


# Tokenizers


def tiny_tokenizer(words=("a", "b"), **special):
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocab, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_tokenizer_hash_follows_vocabulary_and_special_tokens():
    hashes = [
        tokenizer_hash(tiny_tokenizer()),
        tokenizer_hash(tiny_tokenizer(("b", "a"))),
        tokenizer_hash(tiny_tokenizer(bos_token="a")),
        tokenizer_hash(tiny_tokenizer(eos_token="a")),
    ]
    assert len(set(hashes)) == 4
    assert tokenizer_hash(tiny_tokenizer()) == hashes[0]


def test_tokenizer_hash_does_not_change_with_use():
    tokenizer = tiny_tokenizer(pad_token="a")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before


def test_tokenizer_folder_hash_follows_the_tokenizer_files_only(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    before = tokenizer_hash(tmp_path)
    assert tokenizer_hash(str(tmp_path)) == before
    (tmp_path / "README.md").write_text("words")
    assert tokenizer_hash(tmp_path) == before
    (tmp_path / "merges.txt").write_text("a b")
    assert tokenizer_hash(tmp_path) != before


def test_folder_without_a_tokenizer_has_no_tokenizer_hash(tmp_path):
    assert tokenizer_hash(tmp_path) is None


# Hub


def hub_cache(home, name, reference):
    path = home / name / "refs" / reference
    path.parent.mkdir(parents=True)
    path.write_text(COMMIT)
    return home


def test_hub_revision_comes_from_the_local_cache(tmp_path):
    cache = hub_cache(tmp_path, "models--lab--tiny", "main")
    assert resolve_hub_revision("lab/tiny", cache=cache) == COMMIT
    assert resolve_hub_revision("lab/tiny", "v2", cache=cache) is None
    assert resolve_hub_revision("lab/other", cache=cache) is None


def test_commit_is_its_own_revision(tmp_path):
    assert resolve_hub_revision("lab/tiny", COMMIT, cache=tmp_path) == COMMIT


def test_name_that_leads_out_of_the_cache_is_unknown(tmp_path):
    cache = hub_cache(tmp_path / "hub", "models--x", "main").parent
    assert resolve_hub_revision("../hub/x", cache=cache) is None
    assert resolve_hub_revision("x", "../refs/main", cache=tmp_path / "hub") is None


def test_usual_cache_is_asked_when_none_is_given(tmp_path, monkeypatch):
    cache = hub_cache(tmp_path, "models--tiny", "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert resolve_hub_revision("tiny") == COMMIT


def test_damaged_reference_is_unknown(tmp_path):
    cache = hub_cache(tmp_path, "models--tiny", "main")
    (cache / "models--tiny" / "refs" / "main").write_text("not a commit")
    assert resolve_hub_revision("tiny", cache=cache) is None
