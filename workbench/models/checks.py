"""What every backend refuses, in the same words."""

from workbench.attention.edits import EDITABLE_SITES
from workbench.errors import CapabilityError, ConfigError
from workbench.models.base import ModelSpec, Site


def check_layer(spec: ModelSpec, place: Site | int) -> None:
    """Refuse a layer that the model does not have.

    Args:
        spec: The model's sizes.
        place: A layer, or a site; one of the whole model has none.

    Raises:
        ConfigError: With the number of layers.
    """
    layer = place.layer if isinstance(place, Site) else place
    if layer is not None and not 0 <= layer < spec.n_layers:
        raise ConfigError(
            f"layer must be below {spec.n_layers}, the layers of {spec.name}; got {place}"
        )


def check_editable(site: Site) -> None:
    """Refuse an activation edit at a site that can only be read.

    Raises:
        CapabilityError: With the sites where one can be.
    """
    if site.name not in EDITABLE_SITES:
        raise CapabilityError(
            f"an activation edit must be at one of {', '.join(sorted(EDITABLE_SITES))}; got {site}"
        )
