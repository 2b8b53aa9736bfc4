"""What people get wrong: one line, exit code 1, and nothing half-written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def model_copy(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture
def nothing_kept(store_path):
    """After the test the store has no result and no unfinished write.

    Whole parts of a measurement may stay: the next try goes on from them.
    """
    yield
    found = [path for path in store_path.rglob("*") if path.is_file()]
    kept = [path for path in found if path.relative_to(store_path).parts[0] != "pieces"]
    assert [path for path in kept if path.suffix in (".safetensors", ".json", ".tmp")] == []


pytestmark = pytest.mark.usefixtures("nothing_kept")


def on(model, *more):
    data = () if "--data" in more else ("--data", "builtin:short", "--limit", "2")
    return ("run", "attention-sinks", "--model", model, *data, *more)


def test_unknown_probe_offers_the_nearest(command, tiny_folder):
    failed = command("run", "attention-sink", "--model", tiny_folder, "--data", "random")
    assert failed.failed_with("no probe", "Did you mean 'attention-sinks'?")


@pytest.mark.parametrize(
    ("option", "near"),
    [
        (("--backend", "nnsigth"), "nnsight"),
        (("--cache", "raed"), "read"),
        (("--progress", "baar"), "bar"),
        (("--set", "treshold=0.2"), "threshold"),
        (("--set", "n_poss=9"), "n_pos"),
        (("--data", "builtin:naturl"), "natural"),
        (("--format", "jsn"), "json"),
    ],
)
def test_unknown_names_offer_the_nearest(command, tiny_folder, option, near):
    assert command(*on(tiny_folder, *option)).failed_with(f"Did you mean '{near}'?")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--dtype", "float8"), "float32"),
        (("--device", "gpu7"), "cuda"),
        (("--bos", "sometimes"), "always"),
        (("--batch-size", "0"), "at least 1"),
        (("--seed", "-1"), "between 0 and"),
        (("--set", "seed=99999999999999999999"), "between 0 and"),
        (("--limit", "0"), "at least 1"),
        (("--set", "threshold=2"), "between 0.0 and 1.0"),
        (("--set", "threshold=high"), "'high'"),
        (("--set", "inputs=noise"), "repeat"),
        (("--n-pos", "49"), "between 1 and the 48 tokens"),
    ],
)
def test_impossible_values_say_what_is_possible(command, tiny_folder, option, words):
    assert command(*on(tiny_folder, *option)).failed_with(words)


def test_what_run_takes_otherwise_is_no_setting(command, tiny_folder):
    assert command(*on(tiny_folder, "--set", "model=x")).failed_with("no setting", "'model'")


def test_unknown_site_and_list(command):
    assert command("list", "probs").failed_with("Did you mean 'probes'?")


def test_unknown_model_when_the_hub_is_out_of_reach(command):
    failed = command(*on("no-such-owner/no-such-model"))
    assert failed.failed_with("cannot load no-such-owner/no-such-model", "network")


@pytest.mark.parametrize("verb", ["run", "generate", "validate"])
def test_misspelt_models_offer_the_nearest(command, model_copy, verb):
    more = {"run": on("")[4:], "generate": ("--prompt", "a"), "validate": ()}[verb]
    name = ("attention-sinks",) if verb == "run" else ()
    near = str(model_copy)
    failed = command(verb, *name, "--model", near.replace("copy", "coppy"), *more)
    assert failed.failed_with(f"Did you mean '{near}'?")


def test_a_misspelt_demo(command):
    assert command(*on("dmo")).failed_with("cannot load dmo", "Did you mean 'demo'?")


def test_missing_folder(command, tmp_path):
    assert command(*on(tmp_path / "nowhere")).failed_with("there is no folder")


def test_folder_without_weights(command, model_copy):
    (model_copy / "model.safetensors").unlink()
    assert command(*on(model_copy)).failed_with("must have weights (*.safetensors)")


def test_folder_with_only_pickled_weights(command, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    assert command(*on(model_copy)).failed_with("must be safetensors", "pytorch_model.bin")


def test_folder_with_code_of_its_own(command, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.MyModel"}
    (model_copy / "config.json").write_text(json.dumps(config))
    (model_copy / "modeling_mine.py").write_text("raise SystemExit('this code was run')\n")
    assert command(*on(model_copy)).failed_with("brings its own code", "MyModel")


def test_damaged_weights(command, model_copy):
    (model_copy / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json......")
    assert command(*on(model_copy)).failed_with("safetensors")


def test_weights_that_are_not_numbers(command, model_copy):
    weights = load_file(model_copy / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert command(*on(model_copy)).failed_with("must be finite", "h.1.mlp.c_fc.weight")


def test_ids_outside_the_vocabulary(command, tiny_folder, tmp_path):
    save_file({"tokens": torch.full((2, 16), 9999)}, tmp_path / "ids.safetensors")
    failed = command(*on(tiny_folder, "--data", tmp_path / "ids.safetensors"))
    assert failed.failed_with("0 to 256", "9999", "position 0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n\t\n", "is empty"),
        (b"caf\xe9 au lait, s'il vous plait\n", "UTF-8"),
        (b"a\n", "at least 10 tokens"),
        (b"The prompt is longer than the model can take. " * 3, "fit into the 48 tokens"),
    ],
    ids=["empty", "blank", "latin-1", "one-token", "longer-than-n_ctx"],
)
def test_texts_that_cannot_be_measured(command, tiny_folder, tmp_path, content, words):
    (tmp_path / "my.txt").write_bytes(content)
    assert command(*on(tiny_folder, "--data", tmp_path / "my.txt")).failed_with(words)


def test_data_that_is_not_there(command, tiny_folder, tmp_path):
    failed = command(*on(tiny_folder, "--data", tmp_path / "my.txt"))
    assert failed.failed_with("the data file must exist")


def test_no_data(command, tiny_folder):
    failed = command("run", "attention-sinks", "--model", tiny_folder)
    assert failed.failed_with("needs prompts", "--data builtin:natural")


def test_output_into_a_missing_folder_is_refused_before_anything_runs(
    command, tiny_folder, tmp_path
):
    path = tmp_path / "missing" / "sinks.csv"
    assert command(*on(tiny_folder, "-o", path)).failed_with("must exist", "missing")
    assert not path.parent.exists()


def test_output_onto_a_full_disk_leaves_no_part_of_it(command, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_FAULT", "during-file:ENOSPC")
    data = ("--data", "builtin:natural", "--limit", "2", "--n-pos", "16", "--cache", "off")
    failed = command(*on(tiny_folder, *data, "--progress", "off", "-o", tmp_path / "sinks.csv"))
    assert failed.failed_with("no space left", "sinks.csv")
    assert list(tmp_path.glob("*sinks*")) == []


def test_output_of_an_unknown_format(command, tiny_folder, tmp_path):
    failed = command(*on(tiny_folder, "-o", tmp_path / "sinks.xlsx"))
    assert failed.failed_with("no file format is called 'xlsx'", "csv")


def test_output_onto_a_folder(command, tiny_folder, tmp_path):
    assert command(*on(tiny_folder, "-o", tmp_path, "--format", "csv")).failed_with("is a folder")


def test_store_that_is_a_file(command, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("not a store")
    failed = command(*on(tiny_folder, "--store", tmp_path / "file"))
    assert failed.failed_with("must be a folder; it is a file")
    assert (tmp_path / "file").read_text() == "not a store"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_store_without_permission(command, tiny_folder, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    failed = command(*on(tiny_folder, "--n-pos", "16", "--store", locked / "store"))
    assert failed.failed_with("permission was denied")


@pytest.mark.parametrize("error", ["ENOSPC", "EACCES"])
def test_disk_that_refuses(command, tiny_folder, tmp_path, monkeypatch, error):
    monkeypatch.setenv("WORKBENCH_FAULT", f"after-arrays:{error}")
    data = ("--data", "builtin:natural", "--limit", "2", "--n-pos", "16")
    failed = command(*on(tiny_folder, *data, "--progress", "off"))
    assert failed.failed_with({"ENOSPC": "disk is full", "EACCES": "permission"}[error])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ("[]", "one JSON object"),
        ('{"name": "zerotunin"}', "Did you mean 'zerotuning'?"),
        ('{"name": "zerotuning", "gamma": -1.0}', "above 0"),
        ('{"name": "zerotuning", "gamma": 2.0, "heads": [[9, 0]]}', "layer 9"),
        ('{"name": "zerotuning", "gamma": 2, "layers": 12}', "12"),
    ],
)
def test_intervention_files_that_do_not_fit(command, tiny_folder, tmp_path, content, words):
    path = tmp_path / "change.json"
    path.write_text(content)
    failed = command("generate", "-m", tiny_folder, "--prompt", "a", "--intervention", path)
    assert failed.failed_with(words)


def test_an_intervention_file_that_is_a_folder(command, tiny_folder, tmp_path):
    path = tmp_path / "change.json"
    path.mkdir()
    failed = command("generate", "-m", tiny_folder, "--prompt", "a", "--intervention", path)
    assert failed.failed_with("the intervention file must be readable", "is a directory")


def test_no_token_at_all_is_wrong_usage(command, tiny_folder):
    done = command("generate", "-m", tiny_folder, "--prompt", "abc", "--max-new-tokens", "0")
    assert done.code == 2
    assert "greater than or equal to 1" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--intervention", "zerotuning"), "gamma"),
        (("--intervention", "zero-tuning", "--set", "gamma=2"), "'zerotuning'"),
        (("--intervention", "zerotuning", "--set", "gama=2"), "'gamma'"),
        (("--intervention", "zero-heads", "--set", "heads=first"), "L0H3"),
        (("--max-new-tokens", "500"), "n_ctx"),
        (("--prompt", ""), "at least one token"),
    ],
)
def test_generation_that_cannot_be(command, tiny_folder, options, words):
    prompt = () if "--prompt" in options else ("--prompt", "abc")
    assert command("generate", "-m", tiny_folder, *prompt, *options).failed_with(words)


def test_training_without_text(command, tmp_path):
    failed = command("train", "language-model", "-o", tmp_path / "out")
    assert failed.failed_with("--set text=FOLDER")
    assert command("train", "languagemodel", "-o", tmp_path / "out").failed_with("language-model")
    assert not (tmp_path / "out").exists()
