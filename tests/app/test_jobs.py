"""Jobs in processes of their own: found again, cancelled, killed, never started twice."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app import jobs
from workbench.processes import birth_of, is_alive

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="jobs need a Unix system")

RUN = (
    "run",
    "attention-sinks",
    "--model=demo",
    "--data=builtin:natural",
    "--limit=2",
    "--n-pos=32",
)
ID = "0123456789abcdef0000"
"""Of a job that a test writes itself."""


def request(*arguments, kind="run", name="attention-sinks"):
    return jobs.Request(kind, name, arguments)


def long_request():
    """A run of many minutes."""
    return request(
        "train", "bigram-backcopy", "--output=never-ending", "--set=steps=1000000", kind="train"
    )


def wait_for(store, job, *states, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = jobs.read(store, job.id)
        if found.state in states:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{job.id} is {found.state}: {jobs.log_tail(found)}")


@pytest.fixture
def store(store_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    yield store_path
    for job in jobs.listing(store_path):
        if job.is_running and job.id != ID:  # that one has no process
            jobs.cancel(job, grace=0.0)
            wait_for(store_path, job, "cancelled", "killed", "failed", "done")


def written(store, job_id, **status):
    """A job's folder as a process would have left it."""
    folder = jobs.jobs_folder(store) / job_id
    folder.mkdir(parents=True)
    asked = {"kind": "run", "name": "attention-sinks", "arguments": list(RUN), "about": {}}
    (folder / "request.json").write_text(json.dumps(asked))
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_a_job_that_fails_says_why(store):
    job, _ = jobs.start(store, request("run", "attention-sinks", "--model=no-such-folder/at-all"))
    failed = wait_for(store, job, "done", "failed")
    assert failed.state == "failed"
    assert failed.message


def test_two_tabs_that_start_the_same_run_get_one_job(store):
    asked = long_request()
    with ThreadPoolExecutor(4) as tabs:
        started = list(tabs.map(lambda _: jobs.start(store, asked), range(4)))
    assert len({job.id for job, _ in started}) == 1
    assert sum(new for _, new in started) == 1


def test_another_request_is_another_job(store):
    assert request("run", "a").hash != request("run", "b").hash
    assert request("run", "a").hash == request("run", "a").hash


def test_cancelling_ends_the_process(store):
    job, _ = jobs.start(store, long_request())
    running = wait_for(store, job, "running")
    pid = json.loads((running.folder / "status.json").read_text())["pid"]
    jobs.cancel(running)
    assert wait_for(store, job, "cancelled", "killed").state == "cancelled"
    assert birth_of(pid) is None


def test_a_job_cancelled_before_it_has_begun_never_runs(store):
    job, _ = jobs.start(store, long_request())
    jobs.cancel(jobs.read(store, job.id))  # its process is still importing
    assert wait_for(store, job, "cancelled").state == "cancelled"
    status = job.folder / "status.json"
    end = time.monotonic() + 120
    while "code" not in (json.loads(status.read_text()) if status.exists() else {}):
        assert time.monotonic() < end, "the process neither ended nor said so"
        time.sleep(0.1)
    assert json.loads(status.read_text())["state"] == "cancelled"
    assert not (job.folder.parents[1] / "never-ending").exists()


def test_a_killed_process_reads_as_killed(store):
    job, _ = jobs.start(store, long_request())
    running = wait_for(store, job, "running")
    os.kill(json.loads((running.folder / "status.json").read_text())["pid"], signal.SIGKILL)
    assert wait_for(store, job, "killed", "cancelled").state == "killed"
    again, new = jobs.start(store, long_request())
    assert new
    assert again.id[:16] == job.id[:16]
    assert again.id != job.id


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(store):
    written(store, ID, state="running", pid=os.getpid(), birth="long ago")
    assert jobs.read(store, ID).state == "killed"
    assert is_alive(os.getpid(), birth_of(os.getpid()))


def test_cancelling_never_signals_a_stranger(store):
    written(store, ID, state="running", pid=os.getpid(), birth="long ago")
    jobs.cancel(jobs.read(store, ID), grace=0.0)  # a signal would end this test run
    assert jobs.read(store, ID).state == "cancelled"


def test_a_job_is_cancelled_only_when_its_process_has_gone(store):
    """It notes its cancelling first and then closes its libraries, which takes a moment."""
    me = {"pid": os.getpid(), "birth": birth_of(os.getpid())}
    written(store, ID, state="cancelled", **me)
    assert jobs.read(store, ID).state == "stopping"
    status = jobs.jobs_folder(store) / ID / "status.json"
    status.write_text(json.dumps({"state": "cancelled", **me, "birth": "long ago"}))
    assert jobs.read(store, ID).state == "cancelled"


def test_a_job_that_was_cancelled_before_it_announced_itself_is_still_stopping(store, monkeypatch):
    folder = written(store, ID)
    (folder / "cancel.json").write_text("{}")
    assert jobs.read(store, ID).state == "stopping"
    monkeypatch.setattr(jobs, "START_SECONDS", 0.0)
    assert jobs.read(store, ID).state == "cancelled"


def test_a_job_that_never_announced_itself_is_not_running_forever(store, monkeypatch):
    written(store, ID)
    assert jobs.read(store, ID).state == "starting"
    monkeypatch.setattr(jobs, "START_SECONDS", 0.0)
    assert jobs.read(store, ID).state == "killed"


@pytest.mark.parametrize("name", ["../../etc", "0123", ID.upper(), ID + "0", "", "/" + ID])
def test_what_is_no_id_is_no_path(store, name):
    written(store, ID, state="done")
    assert jobs.read(store, name) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}'])
def test_a_damaged_status_is_no_crash(store, content):
    folder = written(store, ID)
    (folder / "status.json").write_text(content)
    (folder / "out.json").write_text(content)
    assert jobs.read(store, ID).state in jobs.STATES
    assert [job.id for job in jobs.listing(store)] == [ID]


def test_progress_is_read_from_both_kinds_of_lines(store):
    folder = written(store, ID, state="done")
    (folder / "log").write_text('{"message": "loading"}\n{"done": 3, "total": 8}\n')
    job = jobs.read(store, ID)
    assert (job.done, job.total, job.message) == (3, 8, "loading")
    (folder / "log").write_text("step 20/40  loss 1.2  0.1 min left\n")
    assert jobs.read(store, ID).total == 40
    assert "step" not in jobs.log_tail(job)
