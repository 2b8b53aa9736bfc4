"""What the layers of one forward pass have in common, made once a pass instead of once a layer.

The layers of a pass are given the same mask, and edits of several layers the same settings: a bias, a
bound or the place of the first key is the same tensor for all of them.
"""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Shared:
    """Values of one forward pass by what they are made from."""

    def __init__(self) -> None:
        """Start a pass."""
        self._made: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}

    def get(self, name: str, make: Callable[..., Any], *sources: Any) -> Any:
        """``make(*sources)``, or what it gave before for the very same sources in this pass.

        Args:
            name: Of what is made.
            make: Makes it.
            sources: Tensors count by identity: two masks that hold the same are two.
        """
        key = (name, *(id(each) if isinstance(each, Tensor) else each for each in sources))
        found = self._made.get(key)
        if found is None:
            # The sources are kept: an identity must not come back while the pass lasts.
            found = self._made[key] = (sources, make(*sources))
        return found[1]
