"""One new query behind a cache: exact ways that need neither tiles nor a second look at the keys.

* An edit that adds to every query's score on the first key is a mask. The stock kernel adds it as it
  adds its own, so that an edited token costs what a masked one does.
* An edit of the pattern is given the one row, whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionEdit, RowCall
from workbench.attention.inputs import AttentionInputs
from workbench.attention.scores import capped, softmax, wide, wide_dtype

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Handed:
    """What the stock kernel is given: with a static cache, more keys than have come."""

    mask: Tensor | None
    n_keys: int
    sdpa: bool
    """Whether the kernel is SDPA; else eager."""

    def takes_bias(self, inputs: AttentionInputs) -> bool:
        """Whether it adds a mask in the precision of scores, and nothing else changes by it."""
        if inputs.query.device.type != "cpu":
            return False
        if self.mask is None and inputs.key.shape[2] < self.n_keys:
            return False
        # In half precision an eager kernel would go on in float32, and SDPA's way for values of
        # another width would round the mask.
        fused = self.sdpa and inputs.key.shape[-1] == inputs.value.shape[-1]
        return fused or inputs.query.dtype not in _HALF

    def is_grouped(self, inputs: AttentionInputs) -> bool:
        """Whether transformers leaves grouped queries to SDPA: without a mask, for equal small widths."""
        width, n_groups = inputs.key.shape[-1], inputs.n_groups
        plain = self.sdpa and self.mask is None and n_groups > 1
        return plain and inputs.value.shape[-1] == width <= 256


def decoded(
    call: RowCall,
    edits: Sequence[AttentionEdit],
    handed: Handed,
    stock: Callable[[Tensor | None], Tensor],
) -> Float[Tensor, "batch one head d_value"] | None:
    """The output for one new query; None where the edits have no such form.

    Args:
        call: The query.
        edits: Of the layer, in the order in which they apply.
        handed: What the stock kernel is given.
        stock: The stock kernel with a mask in place of its own.
    """
    if all(edit.is_on_first_key for edit in edits) and handed.takes_bias(call.inputs):
        bias = _with_bias(call, edits, handed)
        return _grouped(call.inputs, bias) if handed.is_grouped(call.inputs) else stock(bias)
    if len(edits) == 1 and edits[0].row is not None:
        return attend_row(call, edits[0].row)
    return None


def attend_row(
    call: RowCall, change: Callable[[RowCall, Tensor, Tensor | None], Tensor]
) -> Float[Tensor, "batch one head d_value"]:
    """Attention of one query, its row of the pattern changed on the way."""
    inputs = call.inputs
    query, key, value = wide(inputs.query) * inputs.scaling, wide(inputs.key), wide(inputs.value)
    batch, n_heads, _, d_head = query.shape
    # Query heads of one group are rows of one product: keys are never repeated.
    grouped = query.reshape(batch, key.shape[1], -1, d_head)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).view(batch, n_heads, 1, -1)
    scores = capped(scores, inputs.softcap)
    if inputs.mask is not None:
        scores = scores + call.shared.get("mask", _as_bias, inputs.mask, scores.dtype)
    outside = None
    if inputs.sinks is None:
        pattern = softmax(scores)
    else:
        sink = inputs.sinks.to(scores)[:, None, None].expand(batch, -1, 1, 1)
        whole = softmax(torch.cat([scores, sink], dim=-1))
        pattern, outside = whole[..., :-1], whole[..., -1]
    changed = change(call, pattern, outside)
    mixed = torch.matmul(changed.reshape(batch, key.shape[1], -1, key.shape[2]), value)
    return mixed.view(batch, n_heads, 1, -1).transpose(1, 2).to(inputs.query.dtype)


def _grouped(
    inputs: AttentionInputs, bias: Float[Tensor, "#batch #head one k_pos"]
) -> Float[Tensor, "batch one head d_value"]:
    """SDPA as transformers calls it without a mask; with one it would sum in another order."""
    z = torch.nn.functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=bias,
        scale=inputs.scaling,
        enable_gqa=True,
    )
    return z.transpose(1, 2)


def _with_bias(
    call: RowCall, edits: Sequence[AttentionEdit], handed: Handed
) -> Float[Tensor, "#batch #head one k_pos"]:
    """The stock kernel's mask with what the edits add to the scores on the first key."""
    shared, dtype = call.shared, wide_dtype(call.inputs.query)
    here = shared.get("first", _is_first, call.first_key, handed.n_keys)
    mask = None
    if handed.mask is not None:
        mask = shared.get("mask", _as_bias, handed.mask, dtype)
    if len(edits) == 1 and edits[0].first_key_bias is not None:
        # Layers that are edited alike have one mask.
        return shared.get("bias", _at_first, here, mask, edits[0].first_key_bias, dtype)
    added = reduce(torch.add, (edit.added_to_first_key(call) for edit in edits))
    return _at_first(here, mask, added, dtype)


def _is_first(
    first_key: Int[Tensor, " batch"] | None, n_keys: int
) -> Bool[Tensor, "#batch one one2 k_pos"]:
    """Which key is the first of its prompt."""
    first = torch.zeros(1, dtype=torch.long) if first_key is None else first_key
    return (torch.arange(n_keys) == first[:, None])[:, None, None]


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, "#batch #head q_pos k_pos"]:
    """A mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _at_first(
    here: Bool[Tensor, "#batch one one2 k_pos"],
    mask: Float[Tensor, "#batch #head one k_pos"] | None,
    added: Float[Tensor, "*batch head"],
    dtype: torch.dtype,
) -> Float[Tensor, "#batch #head one k_pos"]:
    """The mask, with one number a head added where the first key is."""
    if added.dim() == 1 and bool((added == added[0]).all()):
        added = added[:1]  # one row serves all heads
    added = added.to(dtype)[..., None, None]
    if mask is None:
        return torch.where(here, added, 0.0)
    return torch.where(here, mask + added, mask)
