"""What forward and backward passes cost in memory, and what is told before it is spent."""

import logging
from collections.abc import Mapping
from typing import Any

from workbench.attention.streaming import PatternStatistic
from workbench.errors import ConfigError
from workbench.memory import SHARE, automatic_batch_size, free_memory_bytes
from workbench.models.base import ModelAdapter, ModelSpec, Site
from workbench.models.inputs import Inputs, device_of

logger = logging.getLogger("workbench")

_TELL_BYTES = 256 << 20
ROOM = 2.25
"""Of a pass: what the allocator keeps between tensors of changing sizes, and the small change.

Measured, resident set of one search in eight processes: 0.75 to 2.0 MB a row where 1.2 are counted; 0.75
in the process whose allocator gave every block back.
"""
_STATE_FACTOR = 200
"""A scan keeps states: twice the width, times 16, some of each."""


def forward_bytes(spec: ModelSpec, n_pos: int, n_logits: int = 1, n_prefix: int = 0) -> int:
    """Bytes of one row of a forward pass without gradient, float32, estimated from above.

    Args:
        spec: Of the model.
        n_pos: Positions of the row that are run.
        n_logits: Positions whose logits are made.
        n_prefix: Positions before them whose keys and values are at hand.
    """
    # One block's activations at a time, but the keys and values of all.
    per_pos = 16 * spec.d_model + 4 * spec.d_mlp + 4 * spec.n_heads * (n_prefix + n_pos)
    if not spec.n_heads:
        per_pos += _STATE_FACTOR * spec.d_model
    floats = (
        n_pos * per_pos + (2 * n_prefix + n_pos) * _kept_keys(spec) + 4 * n_logits * spec.d_vocab
    )
    return int(ROOM * 4 * floats)


def fitting_batch_size(model: ModelAdapter, n_pos: int, kept_bytes: int = 0) -> int:
    """Prompts a forward pass that fit into a share of what is free now, a power of two.

    Args:
        model: It says where the memory must be.
        n_pos: Tokens of the longest prompt.
        kept_bytes: What is kept of every prompt of a batch besides the pass itself.
    """
    free = free_memory_bytes(device_of(model))
    size = automatic_batch_size(model.spec, n_pos, free)
    if not kept_bytes:
        return size
    fits = int(SHARE * free / kept_bytes)
    return min(size, 1 << max(0, fits.bit_length() - 1))


def gradient_bytes(spec: ModelSpec, n_pos: int, n_logits: int = 1, n_prefix: int = 0) -> int:
    """The same for a pass forward and backward; arguments as of ``forward_bytes``."""
    of_layer = 24 * spec.d_model + 6 * spec.d_mlp + 4 * spec.n_heads * (n_prefix + n_pos)
    if not spec.n_heads:
        of_layer += _STATE_FACTOR * spec.d_model
    per_pos = spec.n_layers * of_layer + 8 * spec.d_model
    floats = n_pos * per_pos + 3 * n_prefix * _kept_keys(spec) + 5 * n_logits * spec.d_vocab
    return 4 * floats


def prefix_bytes(spec: ModelSpec, n_pos: int) -> int:
    """Bytes of the keys and values of one row, all layers, float32."""
    return 4 * n_pos * _kept_keys(spec)


def _kept_keys(spec: ModelSpec) -> int:
    return 2 * spec.n_layers * spec.n_kv_heads * spec.d_head


def tell_over_budget(needed: int, budget: int, what: str) -> None:
    """Warn that even the smallest pass is larger than the budget; it is then made alone."""
    if needed > budget:
        logger.warning(
            "%s needs about %.0f MB, more than memory_mb allows (%.0f MB); it is run alone; raise "
            "memory_mb, or shorten prompts and targets",
            what,
            needed / 2**20,
            budget / 2**20,
        )


def pattern_bytes(spec: ModelSpec, batch: int, pos: int, n_sites: int = 1) -> int:
    """Bytes of whole float32 patterns of ``n_sites`` layers."""
    return 4 * n_sites * batch * spec.n_heads * pos * pos


def tell_pattern_memory(spec: ModelSpec, inputs: Inputs, reads: Mapping[Site, Any]) -> None:
    """Log the memory that whole patterns or scores will take; refuse what cannot fit.

    Raises:
        ConfigError: More than the free memory of this machine.
    """
    quadratic = [
        (site, reduce)
        for site, reduce in reads.items()
        if site.name in ("pattern", "attn_scores")
        and not isinstance(reduce, PatternStatistic | Mapping)
    ]
    if not quadratic:
        return
    batch, pos = inputs.tokens.shape
    # A reduction frees each layer's pattern before the next is made.
    kept = sum(reduce is None for _, reduce in quadratic) or 1
    needed = pattern_bytes(spec, batch, pos, kept)
    free = free_memory_bytes()
    if needed > free:
        raise ConfigError(
            f"whole patterns must fit in memory; {kept} layers x {batch} prompts x {spec.n_heads} heads "
            f"x {pos}^2 need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; use a streaming "
            "statistic (reduce={'pattern': ColumnMean()}), fewer layers or shorter prompts"
        )
    level = logging.WARNING if needed > _TELL_BYTES else logging.INFO
    logger.log(level, "whole patterns of %d layers: %.0f MB", kept, needed / 1e6)
