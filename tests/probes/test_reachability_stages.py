"""What a search keeps when it is killed, and what it tells while it runs."""

import itertools

import pytest
import torch

import workbench as wb
from probes.reachability import ReachabilityConfig
from tests.probes.bag_model import bag
from tests.probes.test_reachability_search import STATES, run
from tests.zoo import tiny_model


class KilledError(Exception):
    pass


def keeping(kept, most):
    """A store in memory that is killed when it has kept so many pieces."""

    def keep(name, compute):
        if name in kept:
            return kept[name]
        part = compute()
        if len(kept) >= most:
            raise KilledError
        kept[name] = part
        return part

    return keep


@pytest.mark.parametrize("together", [1, 100])
def test_a_killed_search_goes_on_where_it_was(together):
    config = ReachabilityConfig(k_max=5, iterations=5, batch=20, candidates=10)
    memory = {"batch_size": 20 * together}
    whole = bag(10, 1)
    expected = run(whole, STATES, config, **memory)
    for most in (1, 4, 8, 12):
        kept, again = {}, bag(10, 1)
        with pytest.raises(KilledError):
            run(bag(10, 1), STATES, config, keep=keeping(kept, most), **memory)
        found = run(again, STATES, config, keep=keeping(kept, 10_000), **memory)
        assert torch.equal(found.prompts, expected.prompts)
        assert len(again.rows) < len(whole.rows)


def test_every_solved_pair_is_kept_before_the_next_is_begun():
    config = ReachabilityConfig(k_max=2, method="gradient", iterations=6, batch=10)
    kept, finished = {}, []
    model = bag(10, 1)

    def keep(name, compute):
        if name in kept:
            return kept[name]
        kept[name] = compute()
        finished.append((name, len(model.passes)))
        return kept[name]

    run(model, STATES, config, keep=keep, batch_size=10)
    at = [passes for name, passes in finished if name.startswith("k1-pair")]
    assert len(at) > 5
    assert len(set(at)) == len(at)  # one problem a pass, each kept before the next forward pass


def test_status_names_loss_solved_count_and_time_left(monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr("probes.reachability_stages.time.monotonic", lambda: next(clock))
    told, progress = [], []
    config = ReachabilityConfig(k_max=4, iterations=4, batch=10, candidates=5)
    run(
        bag(10, 1),
        STATES,
        config,
        status=told.append,
        progress=lambda *at: progress.append(at),
    )
    assert any("best loss" in line and "of 20 solved" in line and "left" in line for line in told)
    assert any("step" in line for line in told)
    done = [at for at, _ in progress]
    assert done == sorted(done)
    assert progress[-1][0] == progress[-1][1]


def test_a_run_that_is_killed_goes_on_from_its_store(tmp_path):
    rows = [{"state": [5 + i, 6, 7], "target": 20 + i} for i in range(3)]
    settings = {"k_max": 4, "iterations": 3, "batch": 16, "candidates": 8, "batch_size": 16}
    whole = counting(wb.wrap(tiny_model("llama")))
    expected = wb.run("reachability", whole, rows, **settings)
    broken = counting(wb.wrap(tiny_model("llama")), most=2 * whole.n_calls // 3)
    with pytest.raises(KeyboardInterrupt):
        wb.run("reachability", broken, rows, store=tmp_path, **settings)
    again = counting(wb.wrap(tiny_model("llama")))
    found = wb.run("reachability", again, rows, store=tmp_path, **settings)
    assert torch.equal(found.prompts, expected.prompts)
    assert again.n_calls < whole.n_calls / 2


def counting(model, most=10**9):
    """A model that counts its scoring passes and is killed at one too many."""
    model.n_calls = 0

    def counted(run):
        def call(*args, **options):
            model.n_calls += 1
            if model.n_calls > most:
                raise KeyboardInterrupt
            return run(*args, **options)

        return call

    model.logits, model.continue_from = counted(model.logits), counted(model.continue_from)
    return model
