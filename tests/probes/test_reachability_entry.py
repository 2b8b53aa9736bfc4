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
