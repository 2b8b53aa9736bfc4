"""A sweep as it lies in a store, and the page of it."""

import json

import pytest

from app.report import write_report
from tests.execute.conftest import sinks
from tests.execute.test_sweep import InThisProcess
from workbench.cli.report import report_command
from workbench.errors import StoreError
from workbench.execute.kept import read_sweep
from workbench.execute.sweep import run_plan, sweep_folder
from workbench.store.results import Store

BAD = {"name": "zero-heads", "heads": [[9, 0]]}


@pytest.fixture
def plan(two_models, store):
    """Two cells of which one fails, beside another sweep's."""
    plan = sinks(two_models[:1], interventions=["none", BAD])
    run_plan(plan, store, InThisProcess())
    run_plan(sinks(two_models[1:]), store, InThisProcess())
    return plan


def test_results_come_in_the_plans_order_and_the_rest_with_its_reason(plan, store):
    found = read_sweep(store, plan.key[:8])
    assert found.key == plan.key
    assert len(found.results) == 1
    assert store.get(found.results[0]).probe == "attention-sinks"
    (line,) = found.missing
    assert line.startswith("attention-sinks")
    assert "must" in line  # the sentence of the failed cell
    (sweep_folder(store, plan) / "failures.jsonl").write_text("{cut off")
    assert read_sweep(store, plan.key).missing[0].endswith(": not computed yet")


def test_a_result_that_is_damaged_is_missing(plan, store):
    found = read_sweep(store, plan.key)
    (store.folder(found.results[0]) / "result.json").write_text("{")
    again = read_sweep(store, plan.key)
    assert (again.results, len(again.missing)) == ((), 2)


def test_the_page_of_a_sweep_has_its_results_alone(plan, store, tmp_path, capsys):
    report_command(tmp_path / "sweep.html", store.path, plan.key[:8])
    page = (tmp_path / "sweep.html").read_text("utf-8")
    own = read_sweep(store, plan.key)
    assert page.count("<section id=") == 1
    assert own.results[0] in page
    assert own.missing[0].split(": ")[-1][:20] in page
    assert f"Sweep {plan.key[:12]}" in page
    write_report(Store(store.path), tmp_path / "all.html")
    assert (tmp_path / "all.html").read_text("utf-8").count("<section id=") == 2


@pytest.mark.parametrize("name", ["", "zz", "0123456789abcdef"])
def test_a_sweep_that_is_not_there_lists_those_that_are(plan, store, name):
    with pytest.raises(StoreError, match=r"a sweep is named by its key .*there: [0-9a-f]{12}"):
        read_sweep(store, name)


@pytest.mark.parametrize(
    "change", [{"probe": 1}, {"settings": []}, {"options": {"limit": "all"}}, {"new": 1}]
)
def test_a_damaged_plan_is_one_line(plan, store, change):
    path = sweep_folder(store, plan) / "plan.json"
    kept = json.loads(path.read_text())
    kept["cells"][0] |= change
    path.write_text(json.dumps(kept))
    with pytest.raises(StoreError, match="the plan of a sweep must be readable"):
        read_sweep(store, plan.key)


def test_options_that_were_edited_as_texts_are_read_as_what_they_say(plan, store):
    """Another's hand may write "" for null; without an outcome the cell's files are asked."""
    before = read_sweep(store, plan.key)
    path = sweep_folder(store, plan) / "plan.json"
    kept = json.loads(path.read_text())
    for cell in kept["cells"]:
        cell["options"] |= {"revision": "", "batch_size": "2"}
    path.write_text(json.dumps(kept))
    (path.parent / "outcomes.jsonl").unlink()
    assert read_sweep(store, plan.key).results == before.results
