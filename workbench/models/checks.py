"""What every backend refuses, in the same words."""

from workbench.attention.edits import EDITABLE_SITES
from workbench.errors import CapabilityError, ConfigError
from workbench.models.base import ATTENTION_SITES, ModelSpec, Site
from workbench.models.families import Family


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


def check_place(spec: ModelSpec, family: Family, site: Site) -> None:
    """Refuse a site that an architecture does not have.

    Args:
        spec: The model's sizes.
        family: Where it keeps its parts.
        site: To be read or changed.

    Raises:
        ConfigError: No such layer.
        CapabilityError: No attention, or none before the MLP; says what can be read instead.
    """
    check_layer(spec, site)
    if site.name in ATTENTION_SITES | {"attn_out"} and spec.n_heads == 0:
        raise CapabilityError(
            f"{site} needs attention; {spec.family} has none; read resid_pre, resid_post or mlp_out"
        )
    if site.name == "resid_mid" and family.mid is None:
        raise CapabilityError(
            f"{site} needs attention before the MLP; in {spec.family} here they are parallel or one; "
            "read resid_pre, attn_out and mlp_out"
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
