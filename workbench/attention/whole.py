"""Statistics of a pattern that a backend has already made, whole."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from workbench.attention.streaming import PatternBlock, PatternShape, PatternStatistic


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
    batches, heads, rows, columns = (slice(0, size) for size in pattern.shape)
    block = PatternBlock(pattern, batches, heads, rows, columns, row_valid)
    found = {}
    for name, statistic in statistics.items():
        accumulator = statistic.start(shape)
        accumulator.update(block)
        found[name] = accumulator.finish()
    return found
