"""Help, versions, exit codes and signals of the command as a whole."""

import os
import signal
import subprocess
import sys

import pytest

from workbench import __version__
from workbench.store.results import Store

COMMANDS = (
    "demo", "run", "list", "generate", "train", "validate", "results", "report", "doctor",
)  # fmt: skip


def test_help_names_every_command(command):
    shown = command("--help")
    assert shown.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in shown.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command, name):
    shown = command(name, "--help")
    assert shown.code == 0
    assert f"Usage: workbench {name}" in shown.out


def test_no_command_shows_the_help(command):
    assert command().out == command("--help").out


def test_version(command):
    assert command("--version").out == f"workbench {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), "Did you mean 'run'?"),
        (("run", "attention-sinks"), "Missing option '--model'"),
        (("run", "attention-sinks", "--modle", "x"), "--model"),
        (("run", "attention-sinks", "--model", "x", "--limit", "many"), "'--limit'"),
        (("run", "attention-sinks", "--model", "x", "--set", "threshold"), "key=value"),
        (("run", "attention-sinks", "--model", "x", "--data", "a", "--data", "b"), "NAME=FILE"),
        (("run", "a", "--model", "x", "--json", "--format", "csv"), "-o PATH"),
        (("results",), "Missing command"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(command, arguments, words):
    wrong = command(*arguments)
    assert wrong.code == 2
    assert wrong.out == ""
    assert wrong.err.count("\n") == 1
    assert words in wrong.err


def test_help_imports_nothing_heavy(command):
    heavy = {"torch", "transformers", "plotly", "pandas", "pyarrow", "streamlit"}
    shown = command.alone("--help", python=("-X", "importtime"))
    imported = {line.split("|")[-1].strip() for line in shown.err.splitlines()}
    assert shown.code == 0
    assert not imported & heavy


def test_a_terminal_that_cannot_show_a_letter_is_no_crash(command, tmp_path):
    name = "kein-Träum€.txt"
    failed = command.alone(
        "run", "attention-sinks", "--model", tmp_path, "--data", name,
        PYTHONIOENCODING="ascii", PYTHONUTF8="0",
    )  # fmt: skip
    assert failed.code == 1
    assert "Tr\\xe4um\\u20ac" in failed.err


def test_a_closed_pipe_is_silent(store_path):
    writer = subprocess.Popen(
        [sys.executable, "-m", "workbench", "list", "datasets"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait(timeout=60) == 141


def test_a_bug_shows_a_traceback(command, monkeypatch):
    def broken():
        raise KeyError("a bug")

    monkeypatch.setitem(__import__("workbench.cli.listing").cli.listing.LISTS, "probes", broken)
    with pytest.raises(KeyError, match="a bug"):
        command("list", "probes")


def test_out_of_memory_is_one_line(command, monkeypatch):
    def greedy():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB")

    monkeypatch.setitem(__import__("workbench.cli.listing").cli.listing.LISTS, "probes", greedy)
    assert command("list", "probes").failed_with("memory", "--batch-size")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_stopped_run_keeps_what_was_finished(run_tiny, tiny_folder, store_path, number, code):
    finished = run_tiny("--json").json["key"]
    long_run = [
        "run", "attention-sinks", "--model", str(tiny_folder), "--data", "random",
        "--limit", "100000", "--batch-size", "1", "--progress", "json", "--n-pos", "32",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *long_run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ),
        text=True,
    )
    for line in process.stderr:
        if '"done"' in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert Store(store_path).verify().whole == (finished,)
    assert list((store_path / "temp").iterdir()) == []
