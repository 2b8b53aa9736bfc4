"""``workbench run``: what it prints, writes, keeps and finds again."""

import json

import pytest

from workbench.store.results import Store


def test_json_is_one_object_that_points_at_the_result(run_tiny, store_path):
    found = run_tiny("--json").json
    assert set(found) == {"key", "probe", "metrics", "path", "cached", "seconds"}
    assert found["probe"] == "attention-sinks"
    assert found["metrics"]["n_prompts"] == 4
    assert found["metrics"]["n_pos"] == 32
    assert not found["cached"]
    assert Store(store_path).get(found["key"]).metrics() == found["metrics"]
    assert json.loads((Store(store_path).folder(found["key"]) / "result.json").read_text())
    assert found["path"] == str(Store(store_path).folder(found["key"]))


def test_without_json_a_table_on_stdout_and_the_next_step_on_stderr(run_tiny):
    shown = run_tiny()
    assert "sink_rate" in shown.out
    assert "next: workbench results show" in shown.err


def test_the_same_request_is_answered_from_the_store_without_torch(run_tiny, command, tiny_folder):
    first = run_tiny("--json").json
    again = command.alone(
        "run", "attention-sinks", "--model", tiny_folder, "--data", "builtin:natural",
        "--limit", "4", "--n-pos", "32", "--json", python=("-X", "importtime"),
    )  # fmt: skip
    imported = {line.split("|")[-1].strip() for line in again.err.splitlines()}
    assert again.json["cached"]
    assert again.json["key"] == first["key"]
    assert again.json["metrics"] == first["metrics"]
    assert not imported & {"torch", "transformers", "pandas", "plotly"}


def test_a_setting_may_be_an_option_of_the_run(run_tiny):
    first = run_tiny("--json").json
    same = run_tiny("--n-pos", "40", "--set", "n_pos=32", "--set", "batch-size=auto", "--json")
    assert same.json["key"] == first["key"]


def test_the_batch_size_never_changes_the_key(run_tiny):
    whole = run_tiny("--json", "--cache", "off").json
    pieces = run_tiny("--json", "--cache", "off", "--batch-size", "1").json
    assert pieces["key"] == whole["key"]
    assert pieces["metrics"] == pytest.approx(whole["metrics"], abs=1e-5)


def test_a_probes_own_setting_reaches_it(run_tiny):
    strict = run_tiny("--set", "threshold=0.999", "--json").json
    assert strict["metrics"]["sink_rate"] == 0


def test_an_edited_run_is_another_result_and_says_under_what(run_tiny, command, tmp_path):
    stock = run_tiny("--json").json
    edit = ("--intervention", "zerotuning", "--set", "intervention.gamma=4")
    edited = run_tiny(*edit, "--set", "intervention.heads=L0H0,L1H1", "--json").json
    assert edited["key"] != stock["key"]
    assert edited["metrics"]["mean_score"] > stock["metrics"]["mean_score"]
    path = tmp_path / "edit.json"
    path.write_text('{"name": "zerotuning", "gamma": 4, "heads": [[0, 0], [1, 1]]}')
    shown = run_tiny("--intervention", path)
    assert "under ZeroTuning gamma=4.0 L0H0,L1H1" in shown.err
    listed = command("results", "list", "--json").json["results"]
    assert [entry["edit"] for entry in listed if entry["key"] == stock["key"]] == [""]
    assert {entry["key"] for entry in listed if entry["edit"]} == {edited["key"]}


def test_settings_of_an_intervention_need_one(run_tiny):
    refused = run_tiny("--set", "intervention.gamma=4")
    assert refused.code == 2
    assert "needs --intervention" in refused.err


def test_cache_off_keeps_nothing(run_tiny, store_path):
    found = run_tiny("--cache", "off", "--json").json
    assert found["path"] is None
    assert not store_path.exists()


def test_refresh_computes_again(run_tiny):
    run_tiny()
    assert not run_tiny("--cache", "refresh", "--json").json["cached"]


def test_domains_are_named(run_tiny, store_path):
    found = run_tiny("--data", "prose=builtin:natural", "--data", "code=builtin:code", "--json")
    assert found.json["metrics"]["n_prompts"] == 8


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "html"])
def test_output_takes_the_format_of_its_suffix(run_tiny, tmp_path, suffix):
    path = tmp_path / f"sinks.{suffix}"
    assert run_tiny("-o", path).code == 0
    starts = {"json": b"{", "csv": b"layer,", "parquet": b"PAR1", "html": b"<!DOCTYPE html>"}
    assert path.read_bytes().startswith(starts[suffix])


def test_format_decides_when_the_suffix_does_not(run_tiny, tmp_path):
    assert run_tiny("-o", tmp_path / "sinks.out", "--format", "csv").code == 0
    assert (tmp_path / "sinks.out").read_text().startswith("layer,head,")


def test_format_without_a_file_goes_to_stdout_alone(run_tiny):
    assert run_tiny("--format", "csv").out.startswith("layer,head,")


def test_progress_as_json_lines_on_stderr(run_tiny):
    lines = run_tiny("--progress", "json", "--batch-size", "1", "--json").err.splitlines()
    progress = [json.loads(line) for line in lines if "done" in line]
    assert progress[-1] == {"done": 4, "total": 4}


def test_progress_off_is_silent(run_tiny):
    assert run_tiny("--progress", "off", "--json").err == ""


def test_help_of_a_probe_lists_its_settings(command):
    for arguments in (("attention-sinks", "--help"), ("--help", "attention-sinks")):
        shown = command("run", *arguments)
        assert shown.code == 0
        assert "--set threshold=" in shown.out
        assert "--set inputs=natural|random|repeat|swap" in shown.out
