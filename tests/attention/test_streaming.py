"""Blocked attention against whole attention in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from workbench.attention import streaming
from workbench.attention.inputs import AttentionInputs
from workbench.attention.statistics import (
    ColumnMean,
    RowEntropy,
    SinkLogitGap,
    SinkMass,
    WholePattern,
)
from workbench.attention.streaming import attend, attention_scores
from workbench.attention.whole import statistics_of_pattern

EVERY = {
    "received": ColumnMean(),
    "entropy": RowEntropy(),
    "mass": SinkMass((0, 3)),
    "whole": WholePattern(),
}


def make_inputs(batch=2, heads=4, kv_heads=2, n_q=13, n_k=13, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = draw(batch, heads, n_q, 8), draw(batch, kv_heads, n_k, 8)
    return AttentionInputs(query, key, draw(batch, kv_heads, n_k, 6), None, 0.7, **changes)


def reference(inputs):
    """Pattern, output and log-sum-exp in float64, by the definition."""
    groups = inputs.n_groups
    key = inputs.key.double().repeat_interleave(groups, dim=1)
    value = inputs.value.double().repeat_interleave(groups, dim=1)
    scores = inputs.query.double() @ key.transpose(-1, -2) * inputs.scaling
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    scores = scores.masked_fill(~inputs.visible(), -torch.inf)
    whole = scores
    if inputs.sinks is not None:
        sink = inputs.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        whole = torch.cat([scores, sink], dim=-1)
    pattern = whole.softmax(dim=-1)[..., : scores.shape[-1]].nan_to_num(0.0)
    return pattern, (pattern @ value).transpose(1, 2), whole.logsumexp(dim=-1)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-6)


CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "softcap": {"softcap": 0.8},
    "learned sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
}


@pytest.mark.parametrize("tile_floats", [1, 700, 3000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_tiled_attention_equals_the_definition(case, tile_floats, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    inputs = make_inputs(n_q=40, n_k=40, **CASES[case])
    pattern, output, log_sum = reference(inputs)
    found = attend(inputs, EVERY, want=("output", "log_sum"))
    close(found.output, output)
    close(found.log_sum, log_sum)
    for name, expected in statistics_of_pattern(pattern, EVERY).items():
        close(found.statistics[name], expected)


def tile_sizes(inputs, **options):
    return [
        (
            t.batches.stop - t.batches.start,
            t.kv_heads.stop - t.kv_heads.start,
            t.rows.stop - t.rows.start,
        )
        for t in streaming._tiles(inputs, **({"whole_heads": False} | options))
    ]


def test_tiles_shrink_with_the_budget(monkeypatch):
    inputs = make_inputs(n_q=40, n_k=40)  # 2 prompts, 2 kv heads, 2 query heads each
    assert tile_sizes(inputs) == [(2, 2, 40)]
    monkeypatch.setattr(streaming, "TILE_FLOATS", 2 * 2 * 40 * 40)
    assert tile_sizes(inputs) == [(1, 2, 40)] * 2
    monkeypatch.setattr(streaming, "TILE_FLOATS", 2 * 40 * 40)
    assert tile_sizes(inputs) == [(1, 1, 40)] * 4
    monkeypatch.setattr(streaming, "TILE_FLOATS", 1)
    assert tile_sizes(inputs) == [(1, 1, 16), (1, 1, 16), (1, 1, 8)] * 4
    assert tile_sizes(inputs, whole_heads=True) == [(1, 2, 16), (1, 2, 16), (1, 2, 8)] * 2


@given(
    n_q=st.integers(1, 20),
    extra=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_with_a_cache_equals_the_definition(n_q, extra, heads, seed):
    inputs = make_inputs(1, *heads, n_q, n_q + extra, seed)
    _, output, log_sum = reference(inputs)
    found = attend(inputs, {}, want=("output", "log_sum"))
    close(found.output, output)
    close(found.log_sum, log_sum)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_hide_keys_and_empty_rows_give_zero(kind):
    inputs = make_inputs()
    visible = inputs.visible().expand(2, 1, 13, 13).clone()
    visible[0, :, :, :4] = False  # left padding: the first four rows see nothing
    visible[1, :, 9:, 2] = False
    mask = visible
    if kind == "additive":
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = dataclasses.replace(inputs, mask=mask)
    pattern, output, _ = reference(inputs)
    found = attend(inputs, {"whole": WholePattern()}, want=("output", "log_sum"))
    close(found.output, output)
    close(found.statistics["whole"], pattern)
    assert (found.output[0, :4] == 0).all()
    assert (found.log_sum[0, :, :4] == torch.inf).all()
    assert found.log_sum[0, :, 4:].isfinite().all()


@pytest.mark.parametrize("tile_floats", [1, 700, 1 << 20])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_any_shape_is_read_in_any_tiles(kind, shape, tile_floats, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(*shape, 20, 23, generator=generator) > 0.4
    mask[..., 0] = True
    if kind == "additive":
        bias = torch.randn(*shape, 20, 23, generator=generator)
        mask = bias.masked_fill(~mask, -torch.inf)
    # With causal=True a tile ends at its last query: such a mask must hide what comes later itself.
    inputs = make_inputs(n_q=20, n_k=23, causal=False)
    masked = dataclasses.replace(inputs, mask=mask)
    found = attend(masked, {"whole": WholePattern()}, want=("output", "log_sum"))
    if kind == "bool":
        pattern, output, log_sum = reference(masked)
    else:  # the reference knows masks that hide, not those that add
        scores = attention_scores(inputs).double() + mask
        pattern, log_sum = scores.softmax(dim=-1), scores.logsumexp(dim=-1)
        value = inputs.value.double().repeat_interleave(2, dim=1)
        output = (pattern @ value).transpose(1, 2)
    close(found.statistics["whole"], pattern)
    close(found.output, output)
    close(found.log_sum, log_sum)


def test_padding_rows_count_for_nothing():
    inputs = make_inputs(batch=1)
    valid = (torch.arange(13) < 9).float()[None]
    found = attend(inputs, EVERY, valid, want=()).statistics
    cut = AttentionInputs(
        inputs.query[:, :, :9], inputs.key[:, :, :9], inputs.value[:, :, :9], None, 0.7
    )
    alone = attend(cut, EVERY).statistics
    close(found["received"][..., :9], alone["received"])
    assert (found["received"][..., 9:] == 0).all()
    close(found["entropy"][..., :9], alone["entropy"])
    assert (found["entropy"][..., 9:] == 0).all()
    assert (found["mass"][..., 9:] == 0).all()


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4])
def test_a_tile_that_ends_before_a_key_has_no_mass_on_it(n_rows, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", 1)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", n_rows)
    inputs = make_inputs()
    assert max(rows for _, _, rows in tile_sizes(inputs)) == n_rows
    found = attend(inputs, {"mass": SinkMass((0, 3))}, want=()).statistics["mass"]
    close(found, reference(inputs)[0][..., [0, 3]].sum(dim=-1))


def test_scores_equal_the_definition():
    inputs = make_inputs(softcap=0.8)
    pattern, _, log_sum = reference(inputs)
    scores = attention_scores(inputs)
    close((scores - log_sum[..., None]).exp(), pattern)


def test_uniform_scores_give_the_entropy_of_a_uniform_row():
    inputs = make_inputs()
    flat = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    found = attend(flat, {"entropy": RowEntropy()}).statistics
    close(found["entropy"][0, 0], torch.arange(1, 14).double().log())


def test_large_scores_do_not_overflow():
    inputs = make_inputs()
    steep = dataclasses.replace(inputs, scaling=1e4)
    found = attend(steep, {}, want=("output", "log_sum"))
    close(found.output, reference(steep)[1])
    assert found.log_sum.isfinite().all()


def test_column_mean_divides_by_the_queries_of_the_call():
    # With a cache only the last queries are in the call: the first keys are seen by all of them.
    inputs = make_inputs(batch=1, n_q=3, n_k=10)
    pattern, _, _ = reference(inputs)
    found = attend(inputs, {"received": ColumnMean()}).statistics
    counts = torch.tensor([3.0] * 8 + [2.0, 1.0])
    close(found["received"], pattern.sum(-2) / counts)


@pytest.mark.parametrize("tile_floats", [1, 1 << 20])
def test_statistics_behind_a_cache_are_the_last_rows_of_the_whole_pass(tile_floats, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_FLOATS", tile_floats)
    monkeypatch.setattr(streaming, "MIN_TILE_ROWS", 3)
    whole = make_inputs(n_q=14, n_k=14, seed=1)
    rows = EVERY | {"gap": SinkLogitGap()}
    full = attend(whole, rows, want=()).statistics
    found = attend(
        dataclasses.replace(whole, query=whole.query[:, :, 6:]), rows, want=()
    ).statistics
    for name in ("entropy", "mass", "gap", "whole"):
        torch.testing.assert_close(found[name], full[name][:, :, 6:], rtol=0, atol=2e-6)
    counts = torch.tensor([8.0] * 7 + [7.0, 6, 5, 4, 3, 2, 1])  # queries of the call after each key
    close(found["received"], full["whole"][:, :, 6:].sum(dim=-2) / counts)
    assert full["gap"][:, :, :2].isnan().all()
    assert found["gap"].isfinite().all()


def test_gradients_flow_through_the_blocks():
    inputs = make_inputs(batch=1)
    query = inputs.query.clone().requires_grad_()
    attend(dataclasses.replace(inputs, query=query), {}).output.square().sum().backward()
    exact = inputs.query.double().clone().requires_grad_()
    key = inputs.key.double().repeat_interleave(2, dim=1)
    value = inputs.value.double().repeat_interleave(2, dim=1)
    scores = (exact @ key.transpose(-1, -2) * 0.7).masked_fill(~inputs.visible(), -torch.inf)
    (scores.softmax(-1) @ value).square().sum().backward()
    torch.testing.assert_close(query.grad.double(), exact.grad, rtol=0, atol=1e-5)


def test_small_tiles_are_of_one_prompt_one_group_of_heads_and_some_rows_and_end_with_an_error():
    q, k, v = (torch.zeros(2, n, 10, 8) for n in (4, 2, 2))
    inputs = AttentionInputs(q, k, v, None, 1.0)
    whole = list(streaming._tiles(inputs, whole_heads=False))
    with streaming.small_tiles(4):
        tiles = list(streaming._tiles(inputs, whole_heads=False))
    with pytest.raises(ZeroDivisionError), streaming.small_tiles(4):
        _ = 1 / 0
    assert len(whole) == 1
    assert len(tiles) == 2 * 2 * 3
    assert {tile.rows.stop - tile.rows.start for tile in tiles} == {4, 2}
    assert {(tile.kv_heads.stop, tile.batches.stop) for tile in tiles} == {
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
    }
    assert list(streaming._tiles(inputs, whole_heads=False)) == whole


@pytest.mark.parametrize(
    ("n_pos", "n_tiles", "largest"), [(8192, 64, (4, 1024)), (32768, 1024, (1, 1024))]
)
def test_tiles_on_cuda_are_fewer_and_within_their_budget(n_pos, n_tiles, largest):
    # 32 heads: 2^25 numbers are 4 heads of 1,024 rows and 8,192 keys, or one of 32,768.
    with FakeTensorMode():  # on a device that need not be there
        made = torch.empty(1, 32, n_pos, 128, device="cuda")
    inputs = AttentionInputs(made, made, made, None, 1.0)
    sizes = tile_sizes(inputs)
    assert len(sizes) == n_tiles
    assert set(sizes) == {(1, *largest)}
    with streaming.small_tiles(4):
        first = next(streaming._tiles(inputs, whole_heads=False))
    assert (first.kv_heads, first.rows) == (slice(0, 1), slice(0, 4))
