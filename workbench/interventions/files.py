"""Interventions as objects, dicts or JSON files: one way in.

A file holds ``{"name", "version", "model", "revision", "layers", "n_heads", "heads",
settings ..., "calibration"}``; all but ``name`` and the settings may be absent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.attention.edits import Intervention
from workbench.errors import ConfigError, UnknownNameError
from workbench.interventions.act import ACT
from workbench.interventions.add_vector import AddVector
from workbench.interventions.document import read_document
from workbench.interventions.mean_heads import MeanHeads
from workbench.interventions.move_to_first import MoveToFirst
from workbench.interventions.scale_keys import ScaleKeys
from workbench.interventions.uniform import UniformAttention
from workbench.interventions.zero_heads import ZeroHeads
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelSpec
from workbench.settings import as_float, make_config

INTERVENTIONS: dict[str, type] = {
    "act": ACT,
    "zerotuning": ZeroTuning,
    "zero-heads": ZeroHeads,
    "mean-heads": MeanHeads,
    "add-vector": AddVector,
    "move-to-first": MoveToFirst,
    "scale-keys": ScaleKeys,
    "uniform-attention": UniformAttention,
}
"""Those that a file can hold, by name."""

_ABOUT = ("name", "version", "model", "revision", "layers", "n_heads", "calibration")
VERSION = 1


def as_intervention(item: Any, spec: ModelSpec) -> Intervention:
    """Make an intervention from an object, the content of a file, or a file's path.

    Raises:
        DataError: The file cannot be read.
        ConfigError: It is for another model, or a setting is wrong.
    """
    if isinstance(item, str | Path):
        item = read_document(item)
    if isinstance(item, Mapping):
        return _from_dict(item, spec)
    if isinstance(item, Intervention):
        return item
    raise ConfigError(
        f"an intervention must be an object with name and plan(spec), a dict or a file's path; got "
        f"{type(item).__name__}"
    )


def from_content(content: Mapping[str, Any]) -> Intervention:
    """The intervention that a file's content describes, whatever model it is for.

    Raises:
        UnknownNameError: There is none of the name.
        ConfigError: A newer version, a setting that is missing, unknown or out of range.
    """
    name = content.get("name")
    if not isinstance(name, str) or name not in INTERVENTIONS:
        raise UnknownNameError("intervention", str(name), INTERVENTIONS)
    version = content.get("version", VERSION)
    if type(version) is not int or version > VERSION:
        raise ConfigError(
            f"the intervention file's version must be a whole number up to {VERSION}; got {version!r}; "
            "update workbench"
        )
    settings = {key: value for key, value in content.items() if key not in _ABOUT}
    gamma = settings.get("gamma")
    if isinstance(gamma, list) and all(type(each) in (int, float) for each in gamma):
        settings["gamma"] = tuple(as_float("gamma", each) for each in gamma)
    intervention: Intervention = make_config(INTERVENTIONS[name], settings, name)
    return intervention


def _from_dict(content: Mapping[str, Any], spec: ModelSpec) -> Intervention:
    intervention = from_content(content)
    shape = (("layers", spec.n_layers), ("n_heads", spec.n_heads))
    for key, found in (("revision", spec.revision), *shape):
        wanted = content.get(key)
        if isinstance(wanted, list):
            wanted = None  # a list of layers is checked with the heads
        if wanted is not None and found and wanted != found:
            raise ConfigError(
                f"the intervention must be made for this model; its {key} is {wanted}, {spec.name} has "
                f"{found}; calibrate it again for this model"
            )
    return intervention
