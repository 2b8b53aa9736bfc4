"""The sink-logit gap, streamed from patterns, against its definition on the scores."""

import math

import pytest
import torch

import workbench as wb
from tests.zoo import ATTENTION_FAMILIES, padded, random_tokens, tiny_model
from workbench.attention import streaming
from workbench.attention.inputs import AttentionInputs
from workbench.attention.statistics import SinkLogitGap
from workbench.attention.streaming import attend
from workbench.attention.whole import statistics_of_pattern
from workbench.models.base import Site


def by_definition(scores):
    """S[n, 0] - mean over visible 1 <= j < n of S[n, j], a loop a query, in float64."""
    gap = torch.full(scores.shape[:-1], math.nan, dtype=torch.float64)
    for batch, head, n in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        row = scores[batch, head, n].double()
        others = [row[j] for j in range(1, n) if row[j] > -math.inf]
        if others and row[0] > -math.inf:
            gap[batch, head, n] = row[0] - sum(others) / len(others)
    return gap


def test_gap_of_scores_worked_by_hand():
    # Query 3 has the scores 5, 1, 3 for keys 0, 1, 2 and 100 for itself: 5 - (1 + 3) / 2 = 3.
    scores = torch.full((1, 1, 4, 4), -torch.inf)
    scores[0, 0] = torch.tensor([[0.0, 0, 0, 0], [2.0, 1, 0, 0], [4.0, 1, 7, 0], [5.0, 1, 3, 20]])
    scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    found = statistics_of_pattern(scores.softmax(-1), {"gap": SinkLogitGap()})["gap"][0, 0]
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2:], torch.tensor([3.0, 3.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tile_floats", [64, 1 << 20])
def test_tiles_do_not_change_the_gap(tile_floats, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 13, 8, generator=generator) for _ in range(3))
    inputs = AttentionInputs(query, key[:, :2], value[:, :2], None, 0.7)
    scores = streaming.attention_scores(inputs)
    found = attend(inputs, {"gap": SinkLogitGap()}, want=()).statistics["gap"]
    torch.testing.assert_close(
        found.double(), by_definition(scores), rtol=0, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_gap_equals_that_of_the_scores_on_every_family(family):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(), [12, 8], "right")
    for layer in range(2):
        sites = [Site("pattern", layer), Site("attn_scores", layer)]
        found = model.capture(tokens, sites, {"pattern": SinkLogitGap()}, attention_mask=mask)
        expected = by_definition(found[sites[1]])
        expected[1, :, 8:] = math.nan
        if layer == 0 and family in ("gemma2", "gemma3_text", "gpt_oss", "mistral"):
            assert expected[0, :, 2:].isnan().any(dim=-1).all()  # the window hides the first key
        got = found[sites[0]].double()
        # Keys of a weight below the smallest float are left out: none here, scores lie within 80.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_first_key_of_no_weight_has_no_gap():
    pattern = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0.0, 0.5, 0.5]]])[None]
    found = statistics_of_pattern(pattern, {"gap": SinkLogitGap()})["gap"]
    assert found.isnan().all()
