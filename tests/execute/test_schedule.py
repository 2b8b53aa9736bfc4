"""Who takes which cell: each model is loaded once, unless a second loading pays."""

import pytest

from workbench.execute.cell import Cell, Outcome
from workbench.execute.schedule import Schedule


def cells_of(**counts):
    return [
        Cell(f"{model}{number}", "attention-sinks", model, None, {}, {})
        for model, count in counts.items()
        for number in range(count)
    ]


def drain(schedule, workers):
    """Keys by worker when all take turns, each cell a second and each loading ten."""
    taken = {worker: [] for worker in workers}
    held = dict.fromkeys(workers)
    while len(schedule):
        before = len(schedule)
        for worker in workers:
            cell = schedule.take(worker)
            if cell is None:
                continue
            taken[worker].append(cell.key)
            load = 0.0 if held[worker] == cell.model else 10.0
            held[worker] = cell.model
            schedule.note(Outcome(cell.key, "computed", "r", 1.0 + load, load_seconds=load))
        assert len(schedule) < before
    return taken


def test_two_workers_load_two_models_once_each():
    taken = drain(Schedule(cells_of(a=4, b=4)), ["w", "v"])
    assert taken == {"w": ["a0", "a1", "a2", "a3"], "v": ["b0", "b1", "b2", "b3"]}


def test_one_worker_ends_with_a_model_before_it_takes_the_next():
    taken = drain(Schedule(cells_of(a=2, b=3)), ["w"])["w"]
    assert taken == ["b0", "b1", "b2", "a0", "a1"]


@pytest.mark.parametrize(("left", "helps"), [(10, False), (11, True)])
def test_a_second_worker_loads_only_what_takes_longer_than_loading(left, helps):
    schedule = Schedule(cells_of(a=left + 1))
    cell = schedule.take("w")
    schedule.note(Outcome(cell.key, "computed", "r", 11.0, load_seconds=10.0))
    assert (schedule.take("v") is not None) == helps


def test_all_start_at_once_while_nothing_is_known():
    schedule = Schedule(cells_of(a=5))
    assert {schedule.take(worker).key for worker in "wvu"} == {"a0", "a1", "a2"}


def test_a_cell_is_tried_twice_and_no_more():
    schedule = Schedule(cells_of(a=2))
    cell = schedule.take("w")
    assert schedule.retry(cell)
    schedule.forget("w")
    assert schedule.take("v") is cell
    assert not schedule.retry(cell)
    assert schedule.take("v").key == "a1"


def test_a_model_whose_holder_died_is_free_again():
    schedule = Schedule(cells_of(a=3))
    cell = schedule.take("w")
    schedule.note(Outcome(cell.key, "computed", "r", 11.0, load_seconds=10.0))
    assert schedule.take("v") is None
    schedule.forget("w")
    assert schedule.take("v").key == "a1"
