"""Scaled keys by hand, and under factors that leave nearly nothing of a row."""

import pytest
import torch

import workbench as wb
from tests.interventions.test_pattern_edits import N_POS, captured, mixed
from tests.zoo import random_tokens, tiny_model
from workbench.interventions.scale_keys import ScaleKeys, scale_columns


@pytest.mark.parametrize("factor", [1e-12, 1e-8, 1e-3, 0.5, 3.0, 1e8])
def test_scaled_columns_by_hand_however_small_the_factor(factor):
    rows = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0.5, 0.25, 0], [0, 0, 0]])
    found = scale_columns(rows[None, None], torch.tensor([[0]]), factor)[0, 0]
    half, sink = 0.5 * factor + 0.5, 0.5 * factor + 0.25 + 0.25  # the fourth row has a learned sink
    expected = rows.clone()
    expected[1] = torch.tensor([0.5 * factor, 0.5, 0]) / half
    expected[3] = torch.tensor([0.5 * factor, 0.25, 0]) / sink
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found[[0, 2, 4]], rows[[0, 2, 4]])


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 0.01])
def test_keys_that_nearly_vanish_are_scaled_in_the_model_as_defined(factor):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2, N_POS)
    scores, value = captured(model, tokens, "attn_scores", "v")
    scaled = scores.double().softmax(-1)
    scaled[..., [0, 3]] *= factor
    wanted = (scaled / scaled.sum(-1, keepdim=True)).float()
    with model.edit(ScaleKeys((0, 3), factor)):
        (output,) = captured(model, tokens, "z")
    torch.testing.assert_close(output, mixed(model, wanted, value), rtol=0, atol=2e-5)


def test_scaled_keys_say_how_much_they_amplify_rounding():
    spec = wb.wrap(tiny_model("gpt2")).spec
    for factor, gain in ((4.0, 1.0), (0.25, 4.0)):
        # z is divided by 1 + (factor - 1) * weight, which lies between factor and 1.
        assert ScaleKeys((0,), factor).plan(spec)[0].gain == gain
