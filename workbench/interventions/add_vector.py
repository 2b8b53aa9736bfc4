"""Steering: a vector is added to the residual stream at one site, at every position.

    h' = h + scale * v

The vector may come from a file: safetensors with one tensor ``vector [d_model]``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import EDITABLE_SITES, ActivationEdit, Edit
from workbench.errors import ConfigError
from workbench.interventions.tensor_file import read_tensor
from workbench.models.base import ModelSpec, Site


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add a vector to the residual stream at one site, at every position (steering).

    A zero vector is a no-op.
    """

    site: str
    """E.g. ``L3.resid_pre``; any site of the residual stream."""
    vector: Float[Tensor, " d_model"] | str
    """Or a safetensors file that holds it under this name; it is read at once."""
    scale: float = 1.0
    name: str = "add-vector"

    def __post_init__(self) -> None:
        """Read the file, if it is one.

        Raises:
            DataError: The file cannot be read, or its tensor is not one of numbers.
            ConfigError: The vector or its scale is not finite.
        """
        if isinstance(self.vector, str):
            object.__setattr__(self, "vector", read_tensor(self.vector, "vector"))
        assert isinstance(self.vector, Tensor)
        if not bool(torch.isfinite(self.scale * self.vector).all()):
            raise ConfigError("vector and scale must be finite; got NaN or infinity")

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit at the site, none if the vector is zero.

        Raises:
            ConfigError: No such site on this model, or a vector of another width.
        """
        assert isinstance(self.vector, Tensor)
        site = Site.parse(self.site)
        if site.name not in EDITABLE_SITES - {"z"}:
            raise ConfigError(
                f"site must be in the residual stream; got {site}; use e.g. L0.resid_post"
            )
        if site.layer is not None and site.layer >= spec.n_layers:
            raise ConfigError(
                f"layer must be below {spec.n_layers}, the layers of {spec.name}; got {site}"
            )
        if self.vector.shape != (spec.d_model,):
            raise ConfigError(
                f"vector must be [d_model] = {[spec.d_model]} of {spec.name}; got "
                f"{list(self.vector.shape)}; use one made for this model"
            )
        if self.scale == 0.0 or not torch.any(self.vector):
            return []
        return [ActivationEdit(site, self._add)]

    def _add(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        assert isinstance(self.vector, Tensor)
        return x + (self.scale * self.vector).to(x)
