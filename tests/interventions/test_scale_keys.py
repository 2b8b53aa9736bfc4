"""Scaled keys by hand, and under factors that leave nearly nothing of a row."""

import pytest
import torch

import workbench as wb
from tests.interventions.test_pattern_edits import N_POS, captured, mixed
from tests.zoo import padded, random_tokens, tiny_model
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


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_only_a_factor_of_1_changes_nothing(factor):
    spec = wb.wrap(tiny_model("gpt2")).spec
    assert len(ScaleKeys((0,), factor).plan(spec)) == (0 if factor == 1.0 else spec.n_layers)
    assert not ScaleKeys((), factor).plan(spec)


@pytest.mark.parametrize("lengths", [[1, 1], [6, 1]], ids=["one token", "padded to one"])
def test_a_prompt_s_only_key_is_scaled_against_a_learned_sink(lengths):
    model = wb.wrap(tiny_model("gpt_oss", attn_implementation="eager"))
    tokens, mask = padded(random_tokens(2, lengths[0]), lengths, "left")
    stock = model.capture(tokens, ["L0.pattern"], attention_mask=mask)["L0.pattern"]
    with model.edit(ScaleKeys((0,), 3.0)):
        found = model.capture(tokens, ["L0.pattern"], attention_mask=mask)["L0.pattern"]
    weight = stock[1, :, -1, -1]
    assert ((weight > 0.1) & (weight < 0.9)).any()  # the sink has the rest
    torch.testing.assert_close(found[1, :, -1, -1], 3 * weight / (1 + 2 * weight))
