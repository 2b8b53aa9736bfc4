"""What one call of a layer's attention gives: its output under the active edits, and statistics.

An edit in output form follows the fused kernel. Anything else (statistics beside an edit, two edits, an
edit that needs tiles) goes through the tiled engine, exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from workbench.attention import column_kernel
from workbench.attention.decode import Handed, decoded
from workbench.attention.edits import AttentionCall, AttentionEdit, RowCall, TiledCall
from workbench.attention.flex import flex_first_key, is_asked, refuse_if_asked
from workbench.attention.fused import fused_attention
from workbench.attention.inputs import AttentionInputs
from workbench.attention.key_scores import key_scores
from workbench.attention.shared import Shared
from workbench.attention.statistics import ColumnMean
from workbench.attention.streaming import PatternBlock, PatternStatistic, attend


@dataclass(frozen=True)
class Pass:
    """One call of one layer's attention."""

    inputs: AttentionInputs
    layer: int
    first_key: Tensor | None
    row_valid: Tensor | None
    n_before: int
    handed: Handed
    """What the stock kernel is given; SDPA's gives the rows' log-sum-exp with its output on a CPU."""
    shared: Shared

    @property
    def n_dropped(self) -> int:
        """Keys that a sliding window's cache has let go."""
        return max(0, self.n_before + self.inputs.query.shape[2] - self.inputs.key.shape[2])

    def first_keys(self) -> Tensor:
        """The first real key of every prompt."""
        if self.first_key is not None:
            return self.first_key
        query = self.inputs.query
        return torch.zeros(query.shape[0], dtype=torch.long, device=query.device)


def compute(
    call: Pass,
    statistics: dict[str, PatternStatistic],
    edits: list[AttentionEdit],
    stock: Callable[[Tensor | None], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and statistics of one layer, by the cheapest exact way.

    Args:
        call: Of the layer.
        statistics: Of the edited pattern, by name.
        edits: In the order in which they apply.
        stock: The stock kernel, given a mask.
    """
    if not statistics and not edits:
        return stock(call.handed.mask), {}
    inputs, row_valid = call.inputs, call.row_valid
    if not statistics:
        z = _decoded(call, edits, stock)
        if z is not None:
            return z, {}
    elif column_kernel.is_asked(statistics):
        if edits:
            raise column_kernel.refusal("no edit of attention beside the column means")
        fused = column_kernel.column_means(inputs, statistics, row_valid)
        assert fused.output is not None
        return fused.output, fused.statistics
    # An output form knows the unedited pattern only: statistics, and a second edit, must see what
    # the first one made of it.
    if edits:
        alone = not statistics and len(edits) == 1 and edits[0].uses_output(inputs.query.dtype)
        if not alone and any(edit.first_key_bias is not None for edit in edits):
            refuse_if_asked(inputs)
        if alone:
            z = _output_form(call, edits[0], stock)
            if z is not None:
                return z, {}
        whole = attend(inputs, statistics, row_valid, change=_tile_change(call, edits))
        assert whole.output is not None
        return whole.output, whole.statistics
    found = attend(inputs, statistics, row_valid, want=("output",) if _one_softmax(inputs) else ())
    z = stock(call.handed.mask) if found.output is None else found.output
    return z, found.statistics


def _decoded(
    call: Pass, edits: list[AttentionEdit], stock: Callable[[Tensor | None], Tensor]
) -> Tensor | None:
    """One new query behind a cache; None where there is more to do."""
    inputs, n_before = call.inputs, call.n_before
    if inputs.query.shape[2] != 1 or n_before < 1:
        return None
    if any(edit.first_key_bias is not None for edit in edits) and is_asked(inputs):
        return None
    row = RowCall(inputs, n_before, call.n_dropped, call.first_key, call.shared)
    return decoded(row, edits, call.handed, stock)


def _output_form(
    call: Pass, edit: AttentionEdit, stock: Callable[[Tensor | None], Tensor]
) -> Tensor | None:
    """One edit after the kernel; None where the edit says that it would not be accurate."""
    inputs = call.inputs
    if edit.first_key_bias is not None and is_asked(inputs):
        return flex_first_key(inputs, edit.first_key_bias, call.first_key)
    kernel = fused_attention(inputs) if call.handed.sdpa else None
    if kernel is None:
        fused = _one_softmax(inputs)
        wanted = ("output", "log_sum") if fused else ("log_sum",)
        found = attend(inputs, {}, call.row_valid, want=wanted)
        assert found.log_sum is not None
        z = stock(call.handed.mask) if found.output is None else found.output
        kernel = z, found.log_sum
    output = edit.checked or edit.output
    assert output is not None
    seen = AttentionCall(call.layer, inputs, kernel[1], call.first_key, call.n_dropped)
    return output(seen, kernel[0])


def _one_softmax(inputs: AttentionInputs) -> bool:
    """Whether our own tiles make the output too: else the stock kernel does, bit for bit.

    On a CPU in float32 one blocked softmax serves output and statistics for about the price of the
    fused kernel alone.
    """
    return inputs.query.dtype == torch.float32 and inputs.query.device.type == "cpu"


def _tile_change(
    call: Pass, edits: Sequence[AttentionEdit]
) -> Callable[[PatternBlock], PatternBlock]:
    """Apply edits to every tile, each on what the ones before it made, so that statistics see them."""
    changes = [_begin(call, edit, edits[:index]) for index, edit in enumerate(edits)]

    def change(block: PatternBlock) -> PatternBlock:
        for each in changes:
            block = replace(block, pattern=each(block))
        return block

    return change


def _begin(
    call: Pass, edit: AttentionEdit, before: Sequence[AttentionEdit]
) -> Callable[[PatternBlock], Tensor]:
    first_key = call.first_keys()
    if edit.begin is None:
        whole = edit.pattern
        assert whole is not None

        def alike(block: PatternBlock) -> Tensor:
            # A tile that ends before a prompt's first key holds only rows of padding for it.
            first = first_key[block.batches].clamp(max=block.pattern.shape[-1] - 1)
            return whole(block.pattern, first)

        return alike

    def column_mean() -> Tensor:
        change = _tile_change(call, before) if before else None
        statistics = {"mean": ColumnMean()}
        found = attend(call.inputs, statistics, call.row_valid, want=(), change=change)
        return found.statistics["mean"]

    dropped, n_after = call.n_dropped, call.n_before + call.inputs.query.shape[2]
    n_tokens = n_after - first_key - dropped
    if call.row_valid is not None:
        n_tokens = call.row_valid.sum(dim=1).long()
    scores = partial(key_scores, call.inputs)
    return edit.begin(TiledCall(call.n_before, dropped, first_key, n_tokens, scores, column_mean))
