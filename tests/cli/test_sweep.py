"""``workbench sweep``: dry runs, exit codes, Ctrl-C, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench.store.results import Store


@pytest.fixture
def plan_file(tiny_folder, tmp_path):
    """Writes a plan of one probe on a tiny model, with changes."""

    def write(**changes):
        plan = {
            "models": [str(tiny_folder)],
            "probes": {"attention-sinks": {}},
            "data": "builtin:natural",
            "n_pos": 16,
            "limit": 2,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(json.dumps({**plan, **changes}))  # JSON is YAML
        return path

    return write


def test_a_dry_run_says_what_would_run_and_starts_nothing(command, plan_file, store_path):
    done = command("sweep", plan_file(seeds=[0, 1]), "--dry-run", "--json")
    assert done.code == 0
    assert [cell["cached"] for cell in done.json["cells"]] == [False, False]
    assert all(cell["memory_bytes"] > 0 for cell in done.json["cells"])
    assert not (store_path / "sweeps").exists()
    table = command("sweep", plan_file(seeds=[0, 1]), "--dry-run")
    assert table.out.count("to run") == 2
    assert "2 cells: 1 probe, 1 model; 0 cached, 2 to run" in table.err


def test_a_dry_run_says_what_it_does_not_know(command):
    about = ("--probes", "attention-sinks", "--data", "builtin:natural", "--dry-run")
    done = command("sweep", "--models", "nobody/nothing", *about)
    assert "0 cached, 1 to run, how long is not known" in done.err
    both = command("sweep", "--models", "nobody/nothing,demo", *about)
    assert "s on one worker, and 1 more of unknown length" in both.err
    missing = command("sweep", "--models", "./nothing", *about)
    missing.failed_with("there is no folder nothing")


def test_backends_and_device_map_may_come_from_the_command_line(command, tiny_folder):
    about = ("--probes", "attention-sinks", "--data", "builtin:natural", "--dry-run", "--json")
    more = ("--backends", "hf,nnsight", "--device-map", "auto")
    cells = command("sweep", "--models", tiny_folder, *about, *more).json["cells"]
    assert [cell["options"].get("backend") for cell in cells] == [None, "nnsight"]
    assert {cell["device_map"] for cell in cells} == {"auto"}


def test_what_was_run_by_hand_is_cached(command, plan_file, run_tiny):
    run_tiny("--limit", "2", "--n-pos", "16")
    done = command("sweep", plan_file(), "--dry-run", "--json").json
    assert done["cached"] == 1
    again = command("sweep", plan_file(), "--json")
    assert (again.code, again.json["cached"]) == (0, 1)
    assert again.json["cells"][0]["key"] == done["cells"][0]["result"]


def test_verify_looks_at_every_byte_of_what_is_cached(command, plan_file, run_tiny):
    result = run_tiny("--limit", "2", "--n-pos", "16", "--json").json
    arrays = Path(result["path"]) / "arrays.safetensors"
    content = arrays.read_bytes()
    arrays.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    about = (plan_file(), "--dry-run", "--json")
    assert command("sweep", *about).json["cached"] == 1
    checked = command("sweep", *about, "--verify")
    assert checked.json["cached"] == 0
    assert "does not match its SHA-256" in checked.err


def test_lists_may_come_from_the_command_line(command, tiny_folder):
    done = command(
        *("sweep", "--models", f"{tiny_folder},demo", "--probes", "attention-sinks"),
        *("--data", "builtin:natural,builtin:code", "--seeds", "0,1", "--n-pos", "16"),
        *("--set", "threshold=0.2,0.4", "--limit", "2", "--dry-run", "--json"),
    )
    assert len(done.json["cells"]) == 2 * 2 * 2 * 2
    assert {cell["settings"]["threshold"] for cell in done.json["cells"]} == {0.2, 0.4}
    wrong = command("sweep", "--models", "demo", "--probes", "a,b", "--set", "threshold=1")
    assert wrong.code == 2


def test_what_cannot_fit_is_refused_before_anything_starts(
    command, plan_file, store_path, monkeypatch
):
    monkeypatch.setattr("workbench.memory.free_memory_bytes", lambda: 100_000_000)
    for extra in ((), ("--dry-run",)):
        command("sweep", plan_file(device="cpu"), *extra).failed_with(
            "must fit in memory", "0.1 GB"
        )
    assert not (store_path / "sweeps").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--executor", "slumr"), "Did you mean 'slurm'"),
        (("--workers", "0"), "workers must be at least 1"),
        (("--progress", "bra"), "Did you mean 'bar'"),
        (("--slurm", "partition=gpu"), "--slurm is for --executor slurm"),
        (("--threads", "1", "--executor", "slurm"), "--threads is for --executor local"),
        (("--threads", "0"), "threads must be between 1 and"),
        (("--device-map", "nonsense"), "device_map must be one of auto"),
        (("--probes", "attention-sink"), "Did you mean 'attention-sinks'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line(command, plan_file, options, words):
    command("sweep", plan_file(), *options).failed_with(words)


@pytest.mark.slow
def test_some_failed_is_exit_code_3_and_the_rest_is_kept(command, plan_file, store_path):
    bad = {"name": "zero-heads", "heads": [[9, 0]]}
    plan = plan_file(interventions=["none", bad])
    done = command("sweep", plan, "--json", "--progress", "json")
    assert done.code == 3
    assert (done.json["computed"], done.json["failed"]) == (1, 1)
    assert [cell["status"] for cell in done.json["cells"]] == ["computed", "failed"]
    assert "failed: attention-sinks" in done.err
    lines = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"started", "finished"}
    assert (lines[-1]["sweep"]["done"], lines[-1]["sweep"]["total"]) == (2, 2)
    assert len(Store(store_path).list()) == 1


def test_ctrl_c_stops_within_two_seconds_and_keeps_what_is_done(
    command, plan_file, store_path, tmp_path
):
    plan = plan_file(seeds=list(range(24)))
    sweep = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "workbench",
            "sweep",
            str(plan),
            "--workers",
            "2",
            "--progress",
            "json",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    workers, finished = set(), 0
    for line in sweep.stderr:
        event = json.loads(line)
        workers |= {int(event["worker"])} if event["event"] == "started" else set()
        finished += event["event"] == "finished"
        if finished == 2:
            break
    start = time.monotonic()
    os.killpg(sweep.pid, signal.SIGINT)
    rest = sweep.communicate()[1]
    assert sweep.returncode == 130
    assert time.monotonic() - start < 2
    assert rest.splitlines()[-1] == "workbench: interrupted; what was finished is kept"
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    store = Store(store_path)
    n_kept = len(store.list())
    assert 2 <= n_kept < 24
    assert (store.verify().damaged, list((store_path / "temp").iterdir())) == ({}, [])
    # The same command goes on, and need not have as many workers (more: the executors' slow test).
    (folder,) = [path for path in (store_path / "sweeps").iterdir() if len(path.name) == 64]
    assert json.loads((folder / "progress.json").read_text())["computed"] <= n_kept
    done = command("sweep", plan, "--workers", "1", "--json")
    assert done.json["cached"] == n_kept
    assert done.json["computed"] == 24 - n_kept
