"""Chosen rows of the pattern, against the whole pattern."""

import pytest
import torch

import workbench as wb
from tests.attention.test_streaming import make_inputs, reference
from tests.zoo import random_tokens, tiny_model
from workbench.attention import streaming
from workbench.attention.rows import PatternRows, rows_of_call
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


@pytest.mark.parametrize(("tile_floats", "at_once"), [(64, 1), (1352, 2), (1 << 20, 5)])
def test_a_row_is_put_where_its_prompt_is_however_many_share_a_tile(
    tile_floats, at_once, monkeypatch
):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    inputs = make_inputs(batch=5)
    sizes = [t.batches.stop - t.batches.start for t in streaming._tiles(inputs, whole_heads=False)]
    assert max(sizes) == at_once
    queries = torch.tensor([[12, 0, 5], [3, 7, 7], [10, 5, 1], [0, 1, 2], [11, 12, 4]])
    found = streaming.attend(inputs, {"rows": PatternRows(queries)}, want=()).statistics["rows"]
    pattern = reference(inputs)[0]
    for prompt in range(5):
        expected = pattern[prompt][:, queries[prompt]].float()
        torch.testing.assert_close(found[prompt], expected, rtol=0, atol=2e-6)


PROMPTS = torch.tensor([[0.0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("batch", "n_q", "expected"),
    [
        (2, 3, [[0, 1, 1], [1, 1, 1]]),  # the prompts
        (2, 5, [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),  # without a cache: what came after them too
        (4, 3, [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]),  # two samples of each
        (2, 2, None),  # new tokens alone
        (3, 3, None),  # other prompts
    ],
)
def test_rows_of_a_call_are_real_where_the_prompts_mask_says_so_and_after(batch, n_q, expected):
    found = rows_of_call(PROMPTS, batch, n_q)
    assert (found if found is None else found.tolist()) == expected
