"""Chosen rows of the pattern, against the whole pattern."""

import pytest
import torch

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.attention.rows import PatternRows
from workbench.attention.whole import statistics_of_pattern
from workbench.models.base import Site


def test_rows_are_those_of_each_prompt():
    pattern = torch.rand(2, 3, 5, 5)
    queries = torch.tensor([[4, 1], [0, 2]])
    found = statistics_of_pattern(pattern, {"rows": PatternRows(queries)})["rows"]
    assert found.shape == (2, 3, 2, 5)
    torch.testing.assert_close(found[0, :, 0], pattern[0, :, 4])
    torch.testing.assert_close(found[1, :, 1], pattern[1, :, 2])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_streamed_rows_equal_the_whole_pattern(family, monkeypatch):
    # Small tiles, so that prompts, heads and rows are cut.
    monkeypatch.setattr("workbench.attention.streaming.TILE_FLOATS", 64)
    monkeypatch.setattr("workbench.attention.streaming.TILE_ROWS", 5)
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(3, 12)
    queries = torch.tensor([[11, 0], [3, 7], [10, 5]])
    site = Site("pattern", 1)
    whole = model.capture(tokens, [site])[site]
    rows = model.capture(tokens, [site], {"pattern": PatternRows(queries)})[site]
    for prompt in range(3):
        expected = whole[prompt][:, queries[prompt]]
        torch.testing.assert_close(rows[prompt], expected, rtol=0, atol=1e-6)
