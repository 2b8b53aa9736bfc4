"""The fused kernel's log-sum-exp against scores in double precision."""

from dataclasses import replace

import pytest
import torch

from tests.attention.test_streaming import make_inputs, reference
from workbench.attention.fused import fused_attention


def square(**changes):
    """Inputs whose values are as wide as keys, which the kernel wants."""
    inputs = make_inputs(**changes)
    value = torch.randn(*inputs.key.shape, generator=torch.Generator().manual_seed(3))
    return replace(inputs, value=value)


def masked(inputs, mask):
    return replace(inputs, mask=mask)


def padded_mask(n_q=13, n_k=13, *, additive):
    """Causal, and the second prompt begins at key 3."""
    mask = torch.ones(2, 1, n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    mask[1, :, :, :3] = False
    if not additive:
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "one row", "one row, masked"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_log_sum_are_those_of_the_scores(kind, kv_heads):
    n_q = 1 if "row" in kind else 13
    inputs = square(n_q=n_q, kv_heads=kv_heads)
    if kind in ("bool", "additive"):
        inputs = masked(inputs, padded_mask(additive=kind == "additive"))
    if kind == "one row, masked":
        inputs = masked(inputs, padded_mask(n_q=1, additive=False))
    output, log_sum = fused_attention(inputs)
    _, wanted, logs = reference(inputs)
    empty = ~inputs.visible().any(-1).expand_as(logs)
    # What a row of padding holds is nobody's: an additive mask makes it the mean of all values.
    real = ~empty.transpose(1, 2)
    torch.testing.assert_close(output.double()[real], wanted[real], rtol=0, atol=2e-6)
    torch.testing.assert_close(log_sum.double()[~empty], logs[~empty], rtol=0, atol=2e-6)
    assert bool((log_sum[empty] == torch.inf).all())


def test_the_output_is_the_stock_kernel_s_bit_for_bit():
    inputs = square(kv_heads=4)
    stock = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scaling
    )
    found = fused_attention(inputs)
    assert found is not None
    assert torch.equal(found[0], stock.transpose(1, 2))


def needing_gradient(name):
    inputs = square()
    return replace(inputs, **{name: getattr(inputs, name).clone().requires_grad_()})


LEFT = {
    "a gradient of the queries": needing_gradient("query"),
    "a gradient of the keys": needing_gradient("key"),
    "a gradient of the values": needing_gradient("value"),
    "a cap": square(softcap=2.0),
    "learned sinks": square(sinks=torch.zeros(4)),
    "causal rows behind a cache": square(n_q=3),
    "two causal rows behind a cache": square(n_q=2),
    "values of another width": make_inputs(),
    "another device": replace(square(), query=square().query.to("meta")),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_the_kernel_cannot_do_is_left_to_the_tiles(reason):
    assert fused_attention(LEFT[reason]) is None


def test_it_serves_where_nothing_stands_against_it():
    with torch.no_grad():
        assert fused_attention(needing_gradient("query")) is not None
    inputs = square(n_q=3, causal=False)
    output, log_sum = fused_attention(inputs)
    _, wanted, logs = reference(inputs)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_sum.double(), logs, rtol=0, atol=2e-6)
