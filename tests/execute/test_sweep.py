"""What is kept beside the results, and how progress is told."""

import importlib
import json
from pathlib import Path

import pytest

from tests.execute.conftest import sinks
from workbench.errors import StoreError
from workbench.execute.cell import Cell, LoadedModel, Outcome, run_cell
from workbench.execute.protocol import Advanced, Lost, Started
from workbench.execute.sweep import Progress, cached_results, run_plan, sweep_folder


class InThisProcess:
    """Runs cells here, one after another."""

    name = "here"
    n_workers = 1

    def room(self, cells):
        return None

    def execute(self, cells, store, emit):
        from workbench.store.results import Store

        loaded = LoadedModel()
        for cell in cells:
            emit(Started(cell.key, "here"))
            emit(run_cell(cell, Store(store, report=lambda message: None), loaded))


def test_plan_progress_and_failures_lie_beside_the_results(two_models, store):
    bad = {"name": "zero-heads", "heads": [[9, 0]]}
    plan = sinks(two_models[:1], interventions=["none", bad])
    summary = run_plan(plan, store, InThisProcess())
    folder = sweep_folder(store, plan)
    assert summary.folder == folder == store.path / "sweeps" / plan.key
    kept = json.loads((folder / "plan.json").read_text())
    assert kept["plan"]["models"] == two_models[:1]
    assert [Cell(**cell).key for cell in kept["cells"]] == [cell.key for cell in plan.cells]
    from workbench.revisions import folder_revision

    (model,) = kept["resolved"]["models"].values()
    assert model["revision"] == folder_revision(Path(two_models[0]))
    progress = json.loads((folder / "progress.json").read_text())
    told = {name: progress[name] for name in ("total", "done", "computed", "failed", "running")}
    assert told == {"total": 2, "done": 2, "computed": 1, "failed": 1, "running": {}}
    (line,) = (folder / "failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["cell"] == plan.cells[1].key
    assert failure["asked"]["intervention"] == bad
    # A run in which nothing fails leaves no list of failures.
    run_plan(sinks(two_models[:1]), store, InThisProcess())
    good = sinks(two_models[:1])
    assert not (sweep_folder(store, good) / "failures.jsonl").exists()


def test_a_run_by_hand_counts_as_cached(two_models, store):
    import workbench as wb

    plan = sinks(two_models)
    assert cached_results(plan, store) == {}
    found = wb.run(
        "attention-sinks", two_models[1], "builtin:natural", n_pos=16, limit=2, store=store
    )
    assert cached_results(plan, store) == {plan.cells[1].key: found.key}


def damage(path, at=-1):
    """Turn one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_result_is_no_cached_cell_and_is_computed_again(two_models, store):
    plan = sinks(two_models[:1], seeds=[0, 1, 2, 3])
    first = run_plan(plan, store, InThisProcess())
    cut, turned, other, whole = (store.folder(one.result) for one in first.outcomes)
    (cut / "arrays.safetensors").write_bytes(b"")
    damage(turned / "result.json")
    damage(other / "arrays.safetensors")
    keys = [cell.key for cell in plan.cells]
    # Sizes and the small files are looked at; every byte only when that is asked for.
    assert list(cached_results(plan, store)) == keys[2:]
    assert list(cached_results(plan, store, deep=True)) == keys[3:]
    assert len(list((store.path / "damaged").iterdir())) == 3
    again = run_plan(plan, store, InThisProcess())
    assert [one.status for one in again.outcomes] == ["computed"] * 3 + ["cached"]
    assert [one.result for one in again.outcomes] == [one.result for one in first.outcomes]
    assert len(store.verify().whole) == 4
    assert whole.is_dir()


def test_neighbours_of_one_model_load_it_once(two_models, store, monkeypatch):
    from workbench.models import load as loading

    loads, load = [], loading.load
    monkeypatch.setattr(
        loading, "load", lambda name, *rest: loads.append(name) or load(name, *rest)
    )
    plan = sinks(two_models, seeds=[0, 1, 2])
    summary = run_plan(plan, store, InThisProcess())
    assert summary.count("computed") == 6
    assert loads == two_models
    assert [one.load_seconds > 0 for one in summary.outcomes] == [True, False, False] * 2


def test_a_bug_in_a_probe_costs_its_cell_and_keeps_its_traceback(two_models, store, monkeypatch):
    running = importlib.import_module("workbench.run")  # the package has a function of this name

    measure = running.run

    def broken(probe, model, *rest, seed, **how):
        if seed == 1:
            raise KeyError("no such head")
        return measure(probe, model, *rest, seed=seed, **how)

    monkeypatch.setattr(running, "run", broken)
    summary = run_plan(sinks(two_models[:1], seeds=[0, 1, 2]), store, InThisProcess())
    assert [one.status for one in summary.outcomes] == ["computed", "failed", "computed"]
    (failure,) = summary.failures
    assert "KeyError" in failure.error
    assert "no such head" in failure.details.splitlines()[-1]


def test_memory_that_runs_out_says_what_to_lower(two_models, store, monkeypatch):
    running = importlib.import_module("workbench.run")

    def full(*_, **__):
        raise MemoryError("8 GB")

    monkeypatch.setattr(running, "run", full)
    (failure,) = run_plan(sinks(two_models[:1]), store, InThisProcess()).failures
    assert failure.error.startswith("the cell must fit in memory; 8 GB; lower batch_size")


def test_progress_counts_and_guesses_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(4)
    assert progress.seconds_left() is None
    progress.note(Started("a", "1"))
    progress.note(Advanced("a", 3, 8))
    assert progress.running == {"a": {"worker": "1", "host": "", "done": 3, "total": 8}}
    progress.note(Lost("a", "1", "killed"))
    assert progress.running == {}
    now[0] += 10.0
    progress.note(Outcome("a", "computed", "r", 10.0))
    assert progress.seconds_left() == pytest.approx(30.0)
    progress.note(Outcome("b", "failed", error="no"))
    document = progress.document()
    assert (document["done"], document["computed"], document["failed"]) == (2, 1, 1)


def test_cells_of_the_store_do_not_make_the_guess_too_good(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(12)
    for number in range(10):
        progress.note(Outcome(f"c{number}", "cached", "r"))
    now[0] = 10.0
    progress.note(Outcome("a", "computed", "r", 10.0))
    assert progress.seconds_left() == pytest.approx(10.0)


def test_a_store_that_cannot_be_written_is_one_line(two_models, tmp_path):
    from workbench.store.results import Store

    place = Store(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sweeps").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        run_plan(sinks(two_models[:1]), place, InThisProcess())


def test_a_model_on_several_devices_gives_the_numbers_and_the_key_of_the_whole_one(
    two_models, store
):
    """Here the CPU and the disk are the devices: accelerate brings the second block for each pass."""
    import numpy as np

    import workbench as wb

    inner = ("wte", "wpe", "drop", "ln_f")
    spread = {f"transformer.{name}": "cpu" for name in inner} | {"lm_head": "cpu"}
    spread |= {"transformer.h.0": "cpu", "transformer.h.1": "disk"}
    probes = ["attention-sinks", "successor-heads"]
    plan = sinks(two_models[:1], probes=probes, device_map=spread)
    summary = run_plan(plan, store, InThisProcess())
    assert [one.error for one in summary.outcomes] == [None, None]
    # The same plan on one device finds them, and what is computed anew is equal.
    whole = sinks(two_models[:1], probes=probes, device_map={"": "cpu"})
    assert run_plan(whole, store, InThisProcess()).count("cached") == 2
    for one, probe in zip(summary.outcomes, probes, strict=True):
        anew = wb.run(probe, two_models[0], "builtin:natural", n_pos=16, limit=2)
        assert anew.key == one.result
        for name, array in anew.arrays.items():
            np.testing.assert_array_equal(store.get(one.result).arrays[name], array)
