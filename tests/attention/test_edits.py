"""What an edit is told of a call of attention, against the whole product in float64."""

from dataclasses import replace

import pytest
import torch

from tests.attention.test_streaming import close, make_inputs, reference
from workbench.attention.edits import AttentionCall, AttentionEdit
from workbench.attention.key_scores import first_key_gain
from workbench.attention.whole import change_pattern

N_Q, N_K = 9, 13  # behind a cache of four keys; more keys than d_head = 8
FIRST = torch.tensor([0, 3])
GONE = torch.tensor([-1, 8])
"""The first key has left the cache, or stands behind the first queries."""
PER_HEAD = torch.tensor([0.5, 1.0, 2.0, -1.0])


def make_mask(kind):
    generator = torch.Generator().manual_seed(5)
    visible = torch.rand(2, 1, N_Q, N_K, generator=generator) > 0.3
    if kind == "added":
        bias = torch.randn(2, 4, N_Q, N_K, generator=generator)
        return bias.masked_fill(~visible, -torch.inf)
    return visible if kind == "bool" else None


def make_call(kind="none", first=None, **changes):
    inputs = replace(make_inputs(n_q=N_Q, n_k=N_K, **changes), mask=make_mask(kind))
    return AttentionCall(0, inputs, dense_scores(inputs).logsumexp(dim=-1).float(), first)


def dense_scores(inputs, factor=1.0):
    """All scores, the products times ``factor``, capped and masked: ``[batch head q_pos k_pos]``."""
    key = inputs.key.double().repeat_interleave(2, dim=1)
    if isinstance(factor, torch.Tensor):
        factor = factor.double()[:, None, None]
    scores = inputs.query.double() @ key.transpose(-1, -2) * inputs.scaling * factor
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        return scores + inputs.mask
    return scores.masked_fill(~inputs.visible(), -torch.inf)


@pytest.mark.parametrize("factor", [1, 1.7, PER_HEAD], ids=["stock", "one factor", "by head"])
@pytest.mark.parametrize("changes", [{}, {"softcap": 0.8}, {"causal": False}], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_scores_on_some_keys_are_those_of_the_whole_product(kind, changes, factor):
    call = make_call(kind, **changes)
    columns = torch.tensor([[0, 12, 4, -1], [5, 13, 11, 9]])
    found = call.scores(columns, factor)
    whole = dense_scores(call.inputs, factor)
    for prompt, row in enumerate(columns.tolist()):
        for place, column in enumerate(row):
            if 0 <= column < N_K:
                close(found[prompt, :, :, place], whole[prompt, :, :, column])
            else:
                assert (found[prompt, :, :, place] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_weights_are_columns_of_the_pattern_and_values_rows_of_the_values(kind):
    call = make_call(kind)
    columns = torch.tensor([[0, 12], [5, 9]])
    pattern = dense_scores(call.inputs).softmax(dim=-1)
    weights, values = call.weights(columns), call.values(columns)
    for prompt, row in enumerate(columns.tolist()):
        close(weights[prompt], pattern[prompt][..., row].nan_to_num(0.0))
        for head in range(4):  # two query heads share one of keys and values
            assert torch.equal(values[prompt, head], call.inputs.value[prompt, head // 2, row])


@pytest.mark.parametrize("factor", [1, 1.7, PER_HEAD], ids=["stock", "one factor", "by head"])
@pytest.mark.parametrize("changes", [{}, {"softcap": 0.8}], ids=["plain", "capped"])
@pytest.mark.parametrize("first", [None, FIRST, GONE], ids=["from 0", "padded", "gone"])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_surprise_is_minus_the_log_of_the_first_key_s_weight(kind, first, changes, factor):
    call = make_call(kind, first, **changes)
    columns = [0, 0] if first is None else first.tolist()
    whole = torch.nn.functional.pad(dense_scores(call.inputs, factor), (0, 1), value=-torch.inf)
    score = torch.stack([whole[prompt, :, :, column] for prompt, column in enumerate(columns)])
    expected = (call.log_sum - score).nan_to_num(nan=torch.inf, posinf=torch.inf)
    close(call.surprise(call.first_products(), factor), expected)


@pytest.mark.parametrize("changes", [{}, {"softcap": 0.8}], ids=["plain", "capped"])
@pytest.mark.parametrize("first", [None, FIRST], ids=["from 0", "padded"])
def test_the_first_key_s_gain_is_the_score_scaled_before_the_cap_less_the_score(first, changes):
    inputs = make_inputs(n_q=N_Q, n_k=N_K, causal=False, **changes)
    gain = dense_scores(inputs, PER_HEAD) - dense_scores(inputs)
    found = first_key_gain(inputs, first, PER_HEAD)
    for prompt, column in enumerate([0, 0] if first is None else first.tolist()):
        close(found[prompt], gain[prompt, :, :, column])
    assert torch.equal(found[:, 1], torch.zeros(2, N_Q))  # a factor of 1


@pytest.mark.parametrize("first", [None, FIRST], ids=["from 0", "padded"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_first_key_s_products_and_values_are_those_of_each_prompt(first, kv_heads):
    inputs = make_inputs(kv_heads=kv_heads, n_q=N_Q, n_k=N_K)
    call = AttentionCall(0, inputs, reference(inputs)[2].float(), first)
    products, values = call.first_products(), call.first_values()
    for prompt, column in enumerate([0, 0] if first is None else first.tolist()):
        for head in range(4):
            group = head * kv_heads // 4
            key = inputs.key[prompt, group, column].double()
            close(products[prompt, head], inputs.query[prompt, head].double() @ key)
            assert torch.equal(values[prompt, head], inputs.value[prompt, group, column])
    assert call.first_key_index().tolist() == ([0, 0] if first is None else [0, 3])
    assert (call.columns((0, 4)) - call.first_key_index()[:, None]).tolist() == [[0, 4]] * 2


@pytest.mark.parametrize(
    ("first_column", "n_before", "first", "expected"),
    [
        (0, 0, [0, 0], [5, 5]),
        (0, 0, [2, 0], [3, 5]),  # padding on the left
        (-1, 0, [1, 1], [5, 5]),  # a learned key stands before the prompt's
        (2, 4, [-2, -2], [9, 9]),  # a window has let the first two go
        (0, 4, [1, 0], [8, 9]),
    ],
)
def test_an_edit_of_a_whole_pattern_is_told_how_many_tokens_there_are(
    first_column, n_before, first, expected
):
    told = []

    def begin(call):
        told.append(call)
        return lambda block: block.pattern

    n_keys = n_before + 5 - first_column
    pattern = torch.full((2, 1, 5, n_keys), 1.0 / n_keys)
    edit = AttentionEdit(0, None, None, begin=begin)
    places = {"n_before": n_before, "first_column": first_column}
    change_pattern(edit, pattern, torch.tensor(first), **places)
    assert told[0].n_tokens.tolist() == expected
    # What the mask says comes before what is counted; rows before position 0 are no tokens.
    valid = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    change_pattern(edit, pattern, torch.tensor(first), valid, **places)
    assert told[1].n_tokens.tolist() == [5, 3]
    change_pattern(edit, pattern, torch.tensor(first), valid, n_before=-1)
    assert told[2].n_tokens.tolist() == [4, 3]


def test_an_edit_of_a_whole_pattern_is_told_what_a_learned_sink_has():
    told = []

    def begin(call):
        return lambda block: told.append(block.outside) or block.pattern

    rows = torch.tensor([[1.0, 0, 0], [0.5, 0.25, 0], [0, 0, 0]])  # the last is padding
    edit = AttentionEdit(0, None, None, begin=begin)
    for row in ([0, 1, 2], [0, 2]):
        change_pattern(edit, rows[row][None, None], torch.tensor([0]))
    assert told[0].tolist() == [[[0.0, 0.25, 0.0]]]
    assert told[1] is None


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 50.0), (torch.float32, 50.0), (torch.bfloat16, 2.0), (torch.float16, 2.0)],
)
def test_the_output_form_is_used_up_to_the_largest_gain(dtype, most):
    def used(gain, output=lambda call, z: z):
        return AttentionEdit(0, output, None, gain=gain).uses_output(dtype)

    assert used(most)
    assert not used(most * 1.001)
    assert not used(most, output=None)
