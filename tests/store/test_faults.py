"""SIGKILL at every step of every verb: nothing half published, nothing published lost."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import workbench.store
from tests.store import fire
from workbench.errors import StoreError
from workbench.store import files
from workbench.store.lease import Lease

SOURCES = sorted(Path(workbench.store.__path__[0]).glob("*.py"))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fired(tmp_path_factory):
    """Every scenario, killed at every step once, in a small process that forks quickly."""
    report = tmp_path_factory.mktemp("fire") / "faults.json"
    command = [sys.executable, "-m", "tests.store.fire", "--rounds", "1", "-o", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(report.read_text())["scenarios"]


def test_killed_at_every_step_the_store_is_whole_and_the_verb_can_be_done_again(fired):
    assert list(fired) == [scenario.name for scenario in fire.SCENARIOS]
    for name, row in fired.items():
        assert row["kills"] > len(row["points"]) > 0, name


def test_every_fault_point_of_the_source_was_killed_at(fired):
    assert {point for row in fired.values() for point in row["points"]} == fault_points()


def fault_points():
    """The names of the fault points in the store's source."""
    found = set()
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if call.func.id == "fault" and isinstance(call.args[0], ast.Constant):
                found.add(call.args[0].value)
            if call.func.id == "write_durably" and isinstance(call.args[2], ast.Constant):
                found |= {f"{when}-{call.args[2].value}" for when in ("during", "after")}
    assert len(found) > 20
    return found


WRITES = {
    *("open", "write_bytes", "write_text", "rename", "replace", "mkdir", "unlink", "rmtree"),
    *("link", "symlink_to", "rmdir", "touch", "utime", "executemany"),
}


def test_every_function_of_the_store_that_writes_has_a_fault_point():
    """A function that writes names a fault point, or only prepares or cleans up for one that does."""
    assert {f"{path.stem}.{name}" for path in SOURCES for name in writers(path)} == {
        "catalogue._note",  # inside a transaction that ends after before-commit
        "files.filesystem_now",  # makes and removes an empty file
        "lease._create_in_place",  # for filesystems without links, from _create
        "lease._keep_alive",  # touches the claim's time
        "transfer._extract",  # makes the folder that _extract_members fills
        "transfer._stage",  # makes the folder that copy_durably fills
        "transfer.export",  # makes the parent of the target
        "shelf._place",  # from move_in, between before-rename and after-rename
    }


def writers(path):
    """Functions of a file that write and have no fault point."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(function, ast.FunctionDef):
            calls = [call for call in ast.walk(function) if isinstance(call, ast.Call)]
            names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
            reads = {
                call
                for call in calls
                if getattr(call.func, "attr", "") == "open"
                and not any(
                    flag in ast.unparse(call) for flag in ("'xb'", "'wb'", "'x'", "O_CREAT")
                )
            }
            writing = {
                getattr(call.func, "attr", "") for call in calls if call not in reads
            } & WRITES
            writing -= {"replace"} if "str" in ast.unparse(function) else set()
            if writing and not names & {"fault", "write_durably"}:
                yield function.name


def test_the_environment_names_the_point_and_the_error(monkeypatch):
    monkeypatch.setenv("WORKBENCH_FAULT", "here:ENOSPC")
    files.fault("there")
    with pytest.raises(OSError, match="No space left"):
        files.fault("here")


def test_a_system_without_exchange_replaces_in_two_steps(store, make_result, monkeypatch):
    monkeypatch.setattr("workbench.store.shelf.exchange", lambda one, other: False)
    store.publish(make_result(1))
    new = make_result(2, key=make_result(1).key)
    assert store.publish(new, replace=True).metrics() == new.metrics()
    assert store.verify().whole == (new.key,)
    assert list((store.path / "temp").iterdir()) == []


def test_a_replacement_that_fails_between_its_two_moves_leaves_the_old(
    store, make_result, monkeypatch
):
    monkeypatch.setattr("workbench.store.shelf.exchange", lambda one, other: False)
    old = store.publish(make_result(1))
    rename, asked = type(store.path).rename, []

    def fail(path, target):
        asked.append(path)
        # The third is the move of the new result into the place of the old one.
        if len(asked) == 3:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(store.path), "rename", fail)
    with pytest.raises(StoreError, match="input/output error"):
        store.publish(make_result(2, key=old.key), replace=True)
    assert store.get(old.key).metrics() == make_result(1).metrics()


def test_exchange_swaps_or_does_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    swapped = files.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "who").read_text() == ("b" if swapped else "a")
    assert not files.exchange(tmp_path / "a", tmp_path / "nowhere")
    assert (tmp_path / "a" / "who").exists()


def test_a_filesystem_without_hard_links_still_has_claims(store, monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    with (
        Lease(store.path / "leases", "a" * 64) as one,
        Lease(one.path.parent, "a" * 64, wait=0) as two,
    ):
        assert (one.held, two.held) == (True, False)
    assert list((store.path / "leases").iterdir()) == []
