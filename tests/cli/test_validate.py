"""``workbench validate``: the table, the file and the exit code."""

import json

import pytest

from workbench.models import validate as proofs
from workbench.models.validate import Check, Unavailable


@pytest.fixture
def without_companions(monkeypatch):
    """The comparison of backends has its own tests, and their imports take seconds."""
    absent = [Unavailable("nnsight", "nnsight is not installed")]
    monkeypatch.setattr(proofs, "companions", lambda model: absent)


@pytest.mark.usefixtures("without_companions")
def test_a_sound_model_passes_and_says_what_was_skipped(command, tiny_folder, tmp_path):
    path = tmp_path / "checks.json"
    done = command("validate", "--model", tiny_folder, "--json", "-o", path)
    assert done.code == 0
    assert done.json["passed"]
    checks = {check["name"]: check for check in done.json["checks"]}
    assert checks["rows-sum-to-one"]["passed"]
    assert checks["agrees-with-nnsight"] == {
        "name": "agrees-with-nnsight", "passed": None, "value": None, "bound": None,
        "detail": "nnsight is not installed",
    }  # fmt: skip
    assert json.loads(path.read_text()) == done.json


@pytest.mark.usefixtures("without_companions")
def test_a_failed_check_is_exit_code_1(command, tiny_folder, monkeypatch):
    wrong = Check("rows-sum-to-one", False, 0.5, 1e-4, "layers [0]")
    monkeypatch.setattr(proofs, "validate_model", lambda model, other_backends: [wrong])
    done = command("validate", "--model", tiny_folder)
    assert done.code == 1
    assert "FAILED" in done.out
    assert done.err == (
        "workbench: every check must pass on tiny; failed: rows-sum-to-one (0.5, bound 0.0001)\n"
    )


def test_validate_into_a_missing_folder(command, tiny_folder, tmp_path):
    failed = command("validate", "--model", tiny_folder, "-o", tmp_path / "missing" / "a.json")
    assert failed.failed_with("must exist")
