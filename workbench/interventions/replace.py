"""Put other vectors at chosen positions of one site: the patch of keep-sets and clean items.

With S the positions that are kept, h the activation and r the replacement:

    h'_i = h_i if i in S else r_i

Paper: Kaplan et al. 2025, "Follow the Flow", arXiv:2504.01137, section 3; there r is the encoding
of the empty prompt, position by position. Card: information_flow section 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.attention.edits import EDITABLE_SITES, ActivationEdit, Edit
from workbench.errors import ConfigError
from workbench.models.base import ModelSpec, Site


@dataclass(frozen=True, eq=False)
class ReplacePositions:
    """Replace the activation at every position that is not kept, prompt by prompt.

    It belongs to forward passes of ``batch`` prompts of ``pos`` tokens, without a cache; keeping
    every position is a no-op.
    """

    site: str
    """E.g. ``L3.resid_pre`` or ``ln_final``; any editable site but z."""
    keep: Bool[Tensor, "batch pos"]
    """True where the activation stays."""
    replacement: Float[Tensor, "batch pos d_model"]
    name: str = "replace-positions"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit at the site; none if every position is kept.

        Raises:
            ConfigError: No such site on this model, or sizes that do not fit.
        """
        site = Site.parse(self.site)
        if site.name not in EDITABLE_SITES - {"z"}:
            raise ConfigError(
                f"site must be in the residual stream; got {site}; use e.g. L0.resid_pre"
            )
        if site.layer is not None and site.layer >= spec.n_layers:
            raise ConfigError(
                f"layer must be below {spec.n_layers}, the layers of {spec.name}; got {site}"
            )
        wanted = (*self.keep.shape, spec.d_model)
        if tuple(self.replacement.shape) != wanted:
            raise ConfigError(
                f"replacement must be [batch pos d_model] = {list(wanted)}; got "
                f"{list(self.replacement.shape)}; give one vector a position"
            )
        return [] if bool(self.keep.all()) else [ActivationEdit(site, self._replace)]

    def _replace(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if x.shape[:2] != self.keep.shape:
            raise ConfigError(
                f"keep must have the shape of the prompts, {list(x.shape[:2])}; got "
                f"{list(self.keep.shape)}; make one patch for each batch"
            )
        return torch.where(self.keep.to(x.device)[..., None], x, self.replacement.to(x))
