"""Prefixes that candidates share, and edits: the same numbers as whole rows through the same model."""

import pytest
import torch

import workbench as wb
from probes.reachability_entry import SharedPrefix, find_entry
from tests.probes.test_reachability import ROWS, tiny_toy
from tests.zoo import random_tokens, tiny_model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_candidates_that_share_a_prefix_score_as_whole_rows(family, monkeypatch):
    monkeypatch.setattr("probes.reachability_entry.LEAST_SAVED", 1)
    model = wb.wrap(tiny_model(family))
    rows = random_tokens(1, 12).repeat(9, 1)
    rows[:, 5] = torch.arange(30, 39)
    whole = model.logits(rows, last=1)[:, -1]
    used = []
    make = model.prefix
    model.prefix = lambda tokens: used.append(tokens.shape) or make(tokens)
    shared = SharedPrefix(model)
    for _ in range(2):
        torch.testing.assert_close(shared.last_logits(rows), whole, rtol=1e-4, atol=1e-4)
    assert used == [(1, 5)]  # made once, used twice


def test_models_without_such_a_cache_run_whole_rows(monkeypatch):
    monkeypatch.setattr("probes.reachability_entry.LEAST_SAVED", 1)
    for model in (wb.wrap(tiny_model("mamba")), tiny_toy()):
        rows = torch.arange(3, 15).repeat(4, 1)
        rows[:, 6] = torch.arange(20, 24)
        expected = model.logits(rows, last=1)[:, -1]
        torch.testing.assert_close(SharedPrefix(model).last_logits(rows), expected)


def test_an_entry_that_is_no_sum_is_not_used():
    model = wb.wrap(tiny_model("gpt2"))
    assert find_entry(model, 6) is not None
    real = model.capture
    model.capture = lambda *args: {site: x.square() for site, x in real(*args).items()}
    assert find_entry(model, 6) is None


def test_searches_find_the_same_with_and_without_prefixes(monkeypatch):
    model = wb.wrap(tiny_model("gpt2"))
    settings = {"method": "gradient", "k_max": 4, "iterations": 3, "batch": 24, "candidates": 12}
    plain = wb.run("reachability", model, ROWS, **settings)
    monkeypatch.setattr("probes.reachability_entry.LEAST_SAVED", 1)
    found = wb.run("reachability", model, ROWS, **settings)
    assert torch.equal(found.prompts, plain.prompts)
    torch.testing.assert_close(found.best_loss, plain.best_loss, rtol=1e-4, atol=1e-4)


def test_edits_act_on_every_candidate():
    model = wb.wrap(tiny_model("gpt2"))
    with model.edit(wb.ZeroTuning(gamma=3.0)):
        result = wb.run("reachability", model, ROWS, k_max=2, method="greedy")
        for k, prompt, row in zip(result.k, result.prompts, ROWS, strict=True):
            if k > 0:
                ids = torch.tensor([[*prompt[: int(k)].tolist(), *row["state"]]])
                assert int(model.logits(ids)[0, -1].argmax()) == row["target"]
        assert result.provenance["interventions"]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_an_entry_is_the_residual_stream_at_block_0(family):
    # Learned positions; embeddings times a number; both.
    model = wb.wrap(tiny_model(family))
    entry, rows = find_entry(model, 9), random_tokens(3, 9)
    whole = model.capture(rows, ["L0.resid_pre"])["L0.resid_pre"]
    for first in (0, 4):
        found = entry(rows[:, first:], first)
        torch.testing.assert_close(found, whole[:, first:], rtol=1e-4, atol=1e-5)
    assert entry.table is model.weight("W_E") or torch.equal(entry.table, model.weight("W_E"))


def shared_by(model, rows):
    """The prefixes that are run for some rows, checked against whole rows."""
    used, make = [], model.prefix
    model.prefix = lambda tokens: used.append(tokens.tolist()) or make(tokens)
    shared = SharedPrefix(model)
    found = shared.last_logits(rows)
    model.prefix = make
    torch.testing.assert_close(found, model.logits(rows, last=1)[:, -1], rtol=1e-4, atol=1e-4)
    return used


def test_a_prefix_is_run_once_where_it_saves_enough_tokens():
    model = wb.wrap(tiny_model("llama"))
    rows = random_tokens(1, 11).repeat(9, 1)
    begin = rows[0].tolist()
    rows[:, 8] = torch.arange(30, 39)
    assert shared_by(model, rows) == [[begin[:8]]]  # 8 x 8 tokens
    rows[:, 7] = torch.arange(40, 49)
    assert shared_by(model, rows) == []  # 7 x 8
    # Of rows that are all alike the last token is run for each.
    alike = random_tokens(1, 2).repeat(65, 1)
    assert shared_by(model, alike) == [[alike[0, :1].tolist()]]
    assert shared_by(model, alike[:64]) == []
    # A token that only one of the rows has ends what they share.
    almost = random_tokens(1, 11).repeat(30, 1)
    almost[17, 3] = (almost[17, 3] + 1) % 100
    assert shared_by(model, almost) == [[almost[0, :3].tolist()]]


def test_an_entry_is_found_once_for_rows_that_are_no_longer():
    model, asked = wb.wrap(tiny_model("gpt2")), []
    run = model.capture
    model.capture = lambda tokens, *rest: asked.append(tuple(tokens.shape)) or run(tokens, *rest)
    shared = SharedPrefix(model)
    for n_pos in (6, 6, 4, 7, 5):
        shared.last_logits(random_tokens(2, n_pos))
    assert asked == [(3, 6), (3, 7)]


def test_an_edited_model_runs_whole_rows(monkeypatch):
    monkeypatch.setattr("probes.reachability_entry.LEAST_SAVED", 1)
    model = wb.wrap(tiny_model("gpt2"))
    rows = random_tokens(1, 8).repeat(4, 1)
    rows[:, 5] = torch.arange(30, 34)
    with model.edit(wb.ZeroTuning(gamma=3.0)):
        assert shared_by(model, rows) == []


def test_embeddings_of_another_width_have_no_entry():
    model = wb.wrap(tiny_model("gpt2"))
    weight = model.weight
    model.weight = lambda name, *rest: weight(name, *rest)[:, :16]
    assert find_entry(model, 6) is None
