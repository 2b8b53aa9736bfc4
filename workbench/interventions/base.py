"""What interventions on heads share: how heads are named."""

from collections.abc import Sequence

from workbench.errors import ConfigError
from workbench.models.base import ModelSpec

Heads = tuple[tuple[int, int], ...] | list[tuple[int, int]]
"""(layer, head) pairs, counted from 0."""
LARGEST_FACTOR = 1e30
"""On the attention to some keys: a row is all theirs long before, and more would leave float32."""


def heads_by_layer(heads: Sequence[Sequence[int]] | None, spec: ModelSpec) -> dict[int, list[int]]:
    """Group (layer, head) pairs by layer; None stands for every head.

    Raises:
        ConfigError: The model has no such head.
    """
    if heads is None:
        return {layer: list(range(spec.n_heads)) for layer in range(spec.n_layers)}
    grouped: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < spec.n_layers and 0 <= head < spec.n_heads):
            raise ConfigError(
                f"heads must lie in {spec.n_layers} layers x {spec.n_heads} heads of {spec.name}; "
                f"got layer {layer}, head {head}; choose a head that exists"
            )
        grouped.setdefault(layer, []).append(head)
    return grouped
