"""Tells what whole patterns will cost before they are made."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from workbench.attention.streaming import PatternStatistic
from workbench.errors import ConfigError
from workbench.models.base import ModelSpec, Site
from workbench.models.inputs import Inputs

logger = logging.getLogger("workbench")

_TELL_BYTES = 256 << 20


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


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as the system tells (Linux), else all there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 - not a user's path
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
