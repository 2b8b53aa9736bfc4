"""Statistics and changes of a pattern that a backend has already made, whole."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionEdit, TiledCall
from workbench.attention.key_scores import Factor
from workbench.attention.scores import wide
from workbench.attention.statistics import ColumnMean
from workbench.attention.streaming import PatternBlock, PatternShape, PatternStatistic
from workbench.errors import CapabilityError

ROUNDING = 1e-5
"""A row that sums to less than 1 by more than this has a learned sink."""


def statistics_of_pattern(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    statistics: Mapping[str, PatternStatistic],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
) -> dict[str, Tensor]:
    """Collect statistics from one layer's whole pattern, in float32.

    The same accumulators as in the streaming engine read it as one block of rows, so both ways
    give the same numbers; the caller may free the pattern afterwards.

    Args:
        pattern: After softmax; rows of learned sinks sum to less than 1.
        statistics: What to collect, by name.
        row_valid: 1 for queries that are real tokens, 0 for padding; None: all real.
    """
    pattern = pattern.float()
    batch, n_heads, n_q, n_k = pattern.shape
    shape = PatternShape(batch, n_heads, n_q, n_k, pattern.device, row_valid)
    block = _whole_block(pattern, row_valid)
    found = {}
    for name, statistic in statistics.items():
        accumulator = statistic.start(shape)
        accumulator.update(block)
        found[name] = accumulator.finish()
    return found


def change_pattern(
    edit: AttentionEdit,
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    first_key: Int[Tensor, " batch"],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
    *,
    n_before: int = 0,
    first_column: int = 0,
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """Apply an attention edit to a whole pattern; see ``TiledCall`` for the arguments."""
    whole = _rows_as_meant(pattern)
    changed = _changed(edit, whole, first_key, row_valid, n_before, first_column)
    # What is left alone keeps its bits.
    return torch.where(changed == whole, pattern, changed.to(pattern.dtype))


def _rows_as_meant(pattern: Float[Tensor, "*batch k_pos"]) -> Float[Tensor, "*batch k_pos"]:
    """``wide``; rows that half precision has rounded off a sum of 1 sum to 1 again.

    Otherwise what rounding took would pass for the share of a learned sink.
    """
    whole = wide(pattern)
    if pattern.dtype == whole.dtype:
        return whole
    total = whole.sum(dim=-1, keepdim=True)
    rounded = (total - 1.0).abs() <= torch.finfo(pattern.dtype).eps
    return torch.where(rounded, whole / total, whole)


def _changed(
    edit: AttentionEdit,
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    first_key: Int[Tensor, " batch"],
    row_valid: Float[Tensor, "batch q_pos"] | None,
    n_before: int,
    first_column: int,
) -> Float[Tensor, "batch head q_pos k_pos"]:
    if edit.pattern is not None:
        return edit.pattern(pattern, first_key)
    assert edit.begin is not None  # one of the two is always there

    def column_mean() -> Tensor:
        return statistics_of_pattern(pattern, {"mean": ColumnMean()}, row_valid)["mean"]

    n_tokens = n_before + pattern.shape[-2] - first_key - first_column
    if row_valid is not None:
        # Rows before position 0 are learned tokens, not the prompt's.
        n_tokens = row_valid[:, max(0, -n_before) :].sum(dim=1).long()
    call = TiledCall(n_before, first_column, first_key, n_tokens, _no_scores, column_mean)
    change = edit.begin(call)
    block = _whole_block(pattern, row_valid)
    total = block.pattern.sum(dim=-1)
    lacking = torch.where(total > 0.0, 1.0 - total, 0.0).clamp(min=0.0)
    if bool((lacking > ROUNDING).any()):
        block = replace(block, outside=lacking)
    return change(block)


def _whole_block(pattern: Tensor, row_valid: Tensor | None) -> PatternBlock:
    batches, heads, rows, columns = (slice(0, size) for size in pattern.shape)
    return PatternBlock(pattern, batches, heads, rows, columns, row_valid)


def _no_scores(columns: Tensor, factor: Factor) -> Tensor:
    raise CapabilityError(
        "an edit of scores needs the keys themselves, which this backend does not hand over with the "
        "pattern; use --backend hf"
    )
