"""What an attention edit would make of a prompt's z, asked without making it.

The same two forms as in a pass under the edit: after the fused kernel, or in tiles.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, TiledCall
from workbench.attention.inputs import AttentionInputs
from workbench.attention.key_scores import key_scores
from workbench.attention.statistics import ColumnMean
from workbench.attention.streaming import PatternBlock, attend


def edited_after_kernel(
    edit: AttentionEdit, call: AttentionCall, z: Float[Tensor, "batch pos head d_value"]
) -> Float[Tensor, "batch pos head d_value"] | None:
    """By the edit's output form; None where there is none that is accurate here."""
    output = edit.checked or edit.output
    return output(call, z) if output is not None and edit.uses_output(z.dtype) else None


def edited_in_tiles(
    edit: AttentionEdit, call: AttentionCall, row_valid: Float[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch pos head d_value"]:
    """By changing the pattern tile by tile; the prompts are whole, with padding on the left at most."""
    inputs, first_key = call.inputs, call.first_key_index()

    def column_mean() -> Tensor:
        return attend(inputs, {"mean": ColumnMean()}, row_valid, want=()).statistics["mean"]

    if edit.begin is not None:
        n_tokens = inputs.query.shape[2] - first_key
        scores = partial(key_scores, inputs)
        change = edit.begin(TiledCall(0, 0, first_key, n_tokens, scores, column_mean))
    else:
        change = _alike(edit, first_key)
    return attended(inputs, row_valid, lambda block: replace(block, pattern=change(block)))


def _alike(edit: AttentionEdit, first_key: Tensor) -> Callable[[PatternBlock], Tensor]:
    whole = edit.pattern
    assert whole is not None  # one of the forms is always there

    def change(block: PatternBlock) -> Tensor:
        # A tile that ends before a prompt's first key holds only rows of padding for it.
        return whole(block.pattern, first_key[block.batches].clamp(max=block.pattern.shape[-1] - 1))

    return change


def attended(
    inputs: AttentionInputs,
    row_valid: Float[Tensor, "batch pos"] | None,
    change: Callable[[PatternBlock], PatternBlock] | None = None,
) -> Float[Tensor, "batch pos head d_value"]:
    """The output of a pass over tiles, changed or not."""
    output = attend(inputs, {}, row_valid, change=change).output
    assert output is not None  # it was asked for
    return output
