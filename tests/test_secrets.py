"""What the environment keeps to itself stays there: no key, result, export, report, log or message has it."""

import getpass
import json
import os
import socket
import zipfile
from pathlib import Path

import pytest

from tests.cli.command import Command
from workbench.provenance import canonical_json, environment

SECRETS = {
    name: f"s3cr3t-{index}-{name.lower()}"
    for index, name in enumerate(
        (
            *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NDIF_API_KEY", "WANDB_API_KEY"),
            *("AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WORKBENCH_PASSWORD"),
        )
    )
}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return [value.encode() for value in SECRETS.values()]


def contents(folder):
    """Every byte under a folder, archives unpacked."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            yield path.name, path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as opened:
                    yield from ((name, opened.read(name)) for name in opened.namelist())


def assert_nowhere(needles, folder, *texts):
    for name, content in [*contents(folder), *(("text", text.encode()) for text in texts)]:
        assert [needle for needle in needles if needle in content] == [], name


def short_run(model):
    """The words of a run on two random prompts."""
    prompts = ["--data", "random", "--limit", "2", "--n-pos", "12"]
    return ["run", "attention-sinks", "--model", str(model), *prompts, "--json"]


def everything(command, tiny_folder, tmp_path):
    """A run, a failing run, every way to show or take out a result, a report; what was told."""
    told = []

    def call(*arguments):
        done = command(*arguments)
        told.extend([done.out, done.err])
        return done

    run = short_run(tiny_folder)
    key = call(*run, "-o", str(tmp_path / "out.html")).json["key"]
    assert call(*run[:3], str(tmp_path / "no-such-model"), *run[4:]).code == 1
    assert call(*run[:-1], "--set", "threshold=9").code == 1
    for suffix in ("json", "csv", "zip", "html"):
        assert call("results", "export", key, str(tmp_path / f"x.{suffix}")).code == 0
    for verb in (("list", "--json"), ("show", key), ("show", key, "--json"), ("verify",)):
        assert call("results", *verb).code == 0
    assert call("report", "-o", str(tmp_path / "report.html")).code == 0
    assert call("doctor").code == 0
    return key, told


def test_no_secret_of_the_environment_is_kept_or_told(
    secrets, capfd, store_path, tiny_folder, tmp_path
):
    key, told = everything(Command(capfd), tiny_folder, tmp_path)
    assert len(list(contents(tmp_path))) > 8
    assert_nowhere(secrets, tmp_path, key, *told)


def test_a_result_does_not_say_who_made_it_or_where(capfd, store_path, tiny_folder, tmp_path):
    command = Command(capfd)
    path = Path(command(*short_run(tiny_folder)).json["path"])
    # "root" and the like are words of their own; a name is looked for as a path has it.
    who = [
        str(Path.home()),
        socket.gethostname(),
        f"/{getpass.getuser()}/",
        str(tiny_folder.parent),
    ]
    assert_nowhere([name.encode() for name in who], path)


def test_the_environment_is_versions_only(secrets):
    text = canonical_json(environment())
    assert [secret for secret in secrets if secret in text] == []
    assert set(json.loads(text)) < {
        *("workbench", "python", "platform", "torch", "transformers", "tokenizers", "safetensors"),
        *("numpy", "transformer_lens", "nnsight", "other"),
    }


@pytest.mark.slow
def test_jobs_and_sweeps_tell_no_secret_either(
    secrets, capfd, store_path, tiny_folder, tmp_path, monkeypatch
):
    import time

    from app import jobs

    arguments = ("run", "attention-sinks", "--model", str(tiny_folder), "--data", "random")
    arguments += ("--limit", "2", "--n-pos", "12", "--json", "--progress", "json")
    started = [
        jobs.start(store_path, jobs.Request("run", "attention-sinks", given))[0]
        for given in (arguments, (*arguments, "--set", "threshold=9"))
    ]
    command = Command(capfd)
    plan = [
        "sweep",
        "--models",
        str(tiny_folder),
        "--probes",
        "attention-sinks",
        "--data",
        "random",
    ]
    done = command(*plan, "--limit", "2", "--n-pos", "12", "--seeds", "1,2", "--json")
    assert done.code == 0, done.err
    deadline = time.monotonic() + 300
    while any(jobs.read(store_path, job.id).is_running for job in started):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    states = [jobs.read(store_path, job.id).state for job in started]
    assert states == ["done", "failed"]
    assert_nowhere(secrets, store_path, done.out, done.err)
    assert os.environ["HF_TOKEN"].encode() == secrets[0]
