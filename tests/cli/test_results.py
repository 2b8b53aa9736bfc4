"""``workbench results`` answers on stdout, and says on stderr what a person should know."""

import hashlib
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from workbench.cli.results import app
from workbench.errors import ConfigError, StoreError
from workbench.result import Result
from workbench.store.results import Store

KEYS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    for number, key in enumerate(KEYS):
        made.publish(
            Result(
                key=key,
                probe="attention-sinks",
                version=1,
                config={"threshold": 0.3},
                arrays={"score": np.ones((2, 3), dtype=np.float32)},
                metrics={"sink_rate": number / 8, "undefined": float("nan")},
                labels={"task": ["days"]},
                provenance={"model": "[red]demo", "created": f"2026-01-0{number + 1}T00:00:00Z"},
            )
        )
    return made


@pytest.fixture
def call(store):
    """Run a command on the store; a ``WorkbenchError`` is raised, as the main command expects."""

    def run(*arguments):
        arguments = [*map(str, arguments), "--store", str(store.path)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return run


def as_json(result):
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout, parse_constant=pytest.fail)


def test_list_shows_the_newest_first(call):
    lines = call("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["key", *(key[:12] for key in KEYS[::-1])]
    assert "[red]demo" in lines[1]
    assert "sink_rate 0.25" in lines[1]


def test_list_as_json_can_be_narrowed(call, store):
    listed = as_json(call("list", "--limit", 1, "--json"))
    (entry,) = listed["results"]
    assert listed["store"] == str(store.path)
    assert entry["key"] == KEYS[2]
    assert entry["path"] == str(store.folder(KEYS[2]))
    assert entry["metrics"] == {"sink_rate": 0.25, "undefined": None}
    assert as_json(call("list", "--model", "other", "--json"))["results"] == []


def test_an_empty_list_is_a_message_and_not_a_result(tmp_path):
    done = CliRunner().invoke(app, ["list", "--store", str(tmp_path / "none")])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no such results in" in done.stderr


def test_show_names_numbers_arrays_and_provenance(call, store):
    text = call("show", KEYS[1][:6]).stdout
    for expected in (KEYS[1], "sink_rate", "0.125", "F32 [2, 3]", "threshold", "[red]demo", "days"):
        assert expected in text
    shown = as_json(call("show", KEYS[1], "--json"))
    assert shown["arrays"] == {"score": {"dtype": "F32", "shape": [2, 3]}}
    assert shown["path"] == str(store.folder(KEYS[1]))
    assert shown["schema"] == 1


def test_a_key_that_is_not_there_is_an_error(call):
    with pytest.raises(StoreError, match="no result has the key"):
        call("show", "abcdef" * 5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["{out}.json"], "x.json"),
        (["-o", "{out}.json"], "x.json"),
        (["-o", "{out}", "--format", "json"], "x.json"),
        (["{out}.zip"], "x.zip"),
        (["{out}"], "x"),
    ],
)
def test_export_writes_what_the_suffix_says(call, tmp_path, arguments, name):
    out = [argument.format(out=tmp_path / "x") for argument in arguments]
    written = as_json(call("export", KEYS[0][:8], *out, "--json"))
    assert written == {"key": KEYS[0], "path": str(tmp_path / name)}
    assert (tmp_path / name).exists()


def test_export_names_the_file_when_nobody_does(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("export", KEYS[0], "--format", "zip").exit_code == 0
    assert (tmp_path / f"attention-sinks-{KEYS[0][:12]}.zip").exists()


def test_verify_ends_with_1_when_something_is_damaged(call, store):
    assert call("verify").stdout == "3 whole results, 0 damaged, 0 unreadable\n"
    (store.folder(KEYS[0]) / "arrays.safetensors").write_bytes(b"")
    done = call("verify", "--json")
    assert done.exit_code == 1
    assert list(json.loads(done.stdout)["damaged"]) == [KEYS[0]]
    assert done.stderr.count("\n") == 1
    assert as_json(call("verify", "--json"))["whole"] == sorted(KEYS[1:])


def test_gc_says_what_it_would_remove_and_removes_it(call, store):
    plan = as_json(call("gc", "--keep-latest", 1, "--older-than", "1d", "--dry-run", "--json"))
    assert (plan["dry_run"], sorted(plan["removed"])) == (True, sorted(KEYS[:2]))
    assert len(store.shelf.stamps()) == 3
    assert sorted(call("gc", "--keep-latest", 1).stdout.split()) == sorted(KEYS[:2])
    assert list(store.shelf.stamps()) == [KEYS[2]]


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1y", ""])
def test_an_age_needs_a_unit(call, age):
    with pytest.raises(ConfigError, match="an age must be a number and one of"):
        call("gc", f"--older-than={age}")


def test_rebuild_counts_the_results(call):
    assert as_json(call("rebuild", "--json"))["results"] == 3
    assert call("rebuild").stdout.startswith("3 results in ")


def test_import_takes_over_what_another_store_exported(call, store, tmp_path):
    store.export(KEYS[0], tmp_path / "x.zip")
    other = ["--store", str(tmp_path / "other")]
    done = CliRunner().invoke(app, ["import", str(tmp_path / "x.zip"), *other])
    assert done.stdout == f"{KEYS[0]}\n"
    assert as_json(call("import", tmp_path / "x.zip", "--json"))["present"] == [KEYS[0]]


@pytest.mark.parametrize("command", ["list", "show", "export", "verify", "gc", "rebuild", "import"])
def test_every_command_knows_its_store_and_json(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert "--store" in text
    assert "--json" in text
