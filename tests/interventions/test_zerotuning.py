"""ZeroTuning by hand, and where its two forms change over."""

import math

import pytest
import torch

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.attention.edits import AttentionCall
from workbench.attention.inputs import AttentionInputs
from workbench.errors import ConfigError
from workbench.interventions.base import LARGEST_FACTOR
from workbench.interventions.scale_keys import ScaleKeys
from workbench.interventions.zerotuning import ZeroTuning, scale_first_column
from workbench.models.base import ModelSpec

SPEC = ModelSpec(
    name="made", revision="", family="made", n_layers=1, n_heads=1, n_kv_heads=1,
    d_model=2, d_head=2, d_mlp=8, d_vocab=10, n_ctx=64,
)  # fmt: skip


def scaled(rows, gamma, first=0):
    pattern = torch.tensor(rows)[None, None]
    return scale_first_column(pattern, torch.tensor([first]), torch.tensor(gamma))[0, 0]


def test_a_column_is_scaled_and_the_rows_keep_their_sums():
    found = scaled([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.3, 0.2]], 2.0)
    expected = [[1.0, 0.0, 0.0], [2 / 3, 1 / 3, 0.0], [1 / 1.5, 0.3 / 1.5, 0.2 / 1.5]]
    torch.testing.assert_close(found, torch.tensor(expected))
    found = scaled([[0.0, 1.0, 0.0], [0.0, 0.25, 0.75]], 3.0, first=1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]))


def test_a_learned_sink_keeps_its_share_of_the_row():
    # 0.2 goes to the sink: the row's sum is 0.8 + 0.4 + 0.2 before it is divided.
    torch.testing.assert_close(scaled([[0.4, 0.4]], 2.0), torch.tensor([[0.8 / 1.4, 0.4 / 1.4]]))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_rows_without_the_first_key_stay_bit_for_bit(gamma):
    rows = [[0.0, 0.0, 0.0], [0.0, 0.3, 0.7]]
    assert torch.equal(scaled(rows, gamma), torch.tensor(rows))
    gone = [[0.6, 0.4, 0.0]]  # the first key has left the cache: column 0 holds another
    assert torch.equal(scaled(gone, gamma, first=-1), torch.tensor(gone))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1 / 50), (torch.bfloat16, 1 / 2)])
@pytest.mark.parametrize("above", [0.95, 1.05])
def test_key_mode_gives_its_output_form_up_below_the_least_d(dtype, least, above):
    # A query that sees the first key alone, with the score -1: D = exp((gamma - 1) * -1).
    divisor = least * above
    one = torch.ones(1, 1, 1, 1)
    inputs = AttentionInputs(-one, one, 3 * one, None, 1.0)
    (edit,) = ZeroTuning(1 - math.log(divisor), mode="key").plan(SPEC)
    call = AttentionCall(0, inputs, torch.full((1, 1, 1), -1.0), None)
    z = torch.full((1, 1, 1, 1), 3.0, dtype=dtype)
    found = edit.checked(call, z)
    if above < 1:
        assert found is None
    else:
        assert found.item() == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize(("gamma", "gain"), [(0.02, 50.0), (0.5, 2.0), (1.5, 1.0)])
def test_score_mode_says_how_much_it_may_amplify_rounding(gamma, gain):
    # z is divided by 1 + (gamma - 1) a_0, which lies between gamma and 1.
    (edit,) = ZeroTuning(gamma).plan(SPEC)
    assert edit.gain == pytest.approx(gain)
    assert edit.first_key_bias.tolist() == [pytest.approx(math.log(gamma))]


@pytest.mark.parametrize("make", [lambda g: ZeroTuning(g), lambda g: ScaleKeys((0,), g)])
def test_the_largest_factor_takes_the_row_and_more_is_refused(make):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(2)
    with model.edit(make(LARGEST_FACTOR)):
        found = model.capture(tokens, ["L0.z", "L0.v"])
    value = found["L0.v"][:, :1].repeat_interleave(2, dim=2)
    torch.testing.assert_close(found["L0.z"], value.expand_as(found["L0.z"]), rtol=0, atol=1e-5)
    for factor in (1.01 * LARGEST_FACTOR, 1e39, math.inf, math.nan, 0.0):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1e\\+30"):
            make(factor)
