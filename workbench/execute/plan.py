"""A plan: models x probes x data x dtypes x seeds x interventions, as cells keyed by content.

    models: [demo, gpt2@main, "toy:runs/a@100"]
    probes: {attention-sinks: {threshold: [0.2, 0.3]}, successor-heads: {}}
    data: "builtin:natural"      # a list: one cell each; by probe; or NAME: SOURCE for domains
    seeds: [0, 1]
    n_pos: 64

Every value that is a list is expanded; a list inside a list is one value. Everything that can be
checked without loading a model is checked here, before anything runs.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.execute.cell import Cell
from workbench.execute.inputs import PlanInputs
from workbench.interventions.document import read_document
from workbench.models.names import resolve_model
from workbench.provenance import canonical_json, content_key
from workbench.registry import Probe
from workbench.requests import Options
from workbench.settings import make_config

AXES = {"dtypes": "dtype", "seeds": "seed", "backends": "backend"}
"""Entries in the plural, and the option that a value of theirs is."""
SINGLE = ("limit", "n_pos", "bos", "device", "batch_size")
"""Options under their own name; a list of them is expanded too."""
KEYS = ("models", "probes", "data", "interventions", "device_map", *AXES, *SINGLE)
_NOT_NUMBERS = ("device", "batch_size", "cache")
"""Options that never change the numbers, and so no key."""


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, in order, no two alike."""

    cells: tuple[Cell, ...]
    source: dict[str, Any]
    """The plan as it was written."""
    inputs: PlanInputs = field(default_factory=PlanInputs, compare=False)
    """The files it rests on, as they were when it was made."""

    @property
    def key(self) -> str:
        """SHA-256 of its cells."""
        return content_key({"cells": sorted(cell.key for cell in self.cells)})


def make_plan(document: Mapping[str, Any], hashes: Path | None = None) -> Plan:
    """Expand a plan into cells and check every one of them.

    Args:
        document: The plan, as YAML gives it.
        hashes: Where hashes of large weight files are remembered.

    Raises:
        WorkbenchError: An entry that does not exist or has an impossible value.
    """
    for name in document:
        if name not in KEYS:
            raise UnknownNameError("entry of a plan", str(name), KEYS)
    for name in ("models", "probes"):
        if not document.get(name):
            raise ConfigError(f"a plan must name {name}; there are none; add e.g. {_EXAMPLE[name]}")
    try:
        canonical_json(document)
    except TypeError as error:
        raise ConfigError(
            f"a plan must hold texts, numbers, lists and mappings; {error}"
        ) from error
    inputs = PlanInputs(hashes)
    maker = _CellMaker(inputs)
    cells: dict[str, Cell] = {}
    for asked in _combinations(document):
        cell = maker.make(asked)
        cells.setdefault(cell.key, cell)
    return Plan(tuple(cells.values()), dict(document), inputs)


_EXAMPLE = {"models": "models: [demo]", "probes": "probes: {attention-sinks: {}}"}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _product(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a mapping."""
    for values in itertools.product(*map(_as_list, settings.values())):
        yield dict(zip(settings, values, strict=True))


@dataclass(frozen=True)
class _Asked:
    """One combination of a plan's values, unchecked."""

    model: Any
    probe: str
    settings: dict[str, Any]
    data: Any
    options: dict[str, Any]
    intervention: tuple[dict[str, Any] | None, str]
    """Content and name."""
    device_map: Any


def _combinations(document: Mapping[str, Any]) -> Iterator[_Asked]:
    probes = _probes(document["probes"])
    place = document.get("device_map")
    check_device_map(place)
    shared = {option: document[name] for name, option in AXES.items() if name in document}
    shared |= {name: document[name] for name in SINGLE if name in document}
    interventions = [_intervention(item) for item in _as_list(document.get("interventions"))]
    for model in _as_list(document["models"]):
        for options in _product(shared):
            for item in interventions:
                for name, settings in probes.items():
                    for data in _data_of(name, document.get("data"), probes):
                        for own in _product(settings):
                            yield _Asked(model, name, own, data, options, item, place)


def _probes(given: Any) -> dict[str, dict[str, Any]]:
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        given = dict.fromkeys(given)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"probes must be names, or names with settings; got {given!r}; write {_EXAMPLE['probes']}"
        )
    for name, settings in given.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(
                f"the settings of {name} must be a mapping; got {settings!r}; write "
                f"{name}: {{setting: value}}"
            )
    return {str(name): dict(settings or {}) for name, settings in given.items()}


def _data_of(probe: str, data: Any, probes: Mapping[str, Any]) -> list[Any]:
    """The data sets of one probe: a mapping by probe is one whose every key is a probe's name."""
    if isinstance(data, Mapping) and data and set(data) <= set(probes):
        data = data.get(probe)
    return _as_list(data)


class _CellMaker:
    """Checks and keys cells."""

    def __init__(self, inputs: PlanInputs) -> None:
        self._inputs = inputs
        self._defaults = asdict(Options())

    def make(self, asked: _Asked) -> Cell:
        if not isinstance(asked.model, str) or not asked.model:
            raise ConfigError(f"a model must be a name or a folder; got {asked.model!r}")
        name, revision = self._inputs.once(split_revision, asked.model)
        probe = self._inputs.probe(asked.probe)
        own, options = _options(asked, revision)
        config = _config(probe, own, asked.data)
        data = asked.data if probe.takes_data else None
        prompts = self._inputs.prompts(data, options.limit)
        content, label = asked.intervention
        given = dict(vars(options))
        key = content_key(
            {
                "probe": [probe.name, probe.version],
                "config": asdict(config),
                "model": [name, self._inputs.model(name, revision).revision],
                "data": None if prompts is None else prompts.hash,
                "options": {k: v for k, v in given.items() if k not in _NOT_NUMBERS},
                "intervention": content,
            }
        )
        kept = {
            name: value
            for name, value in given.items()
            if value != self._defaults[name] or name in ("seed", "dtype")
        }
        return Cell(key, probe.name, name, data, own, kept, content, label, asked.device_map)


def split_revision(model: str) -> tuple[str, str | None]:
    """Part ``gpt2@main`` and ``toy:DIR@100``; a folder may have ``@`` in its name."""
    name, _, revision = model.rpartition("@")
    if not name or not revision or Path(resolve_model(model)).exists():
        return model, None
    return name, revision


_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: Any) -> None:
    """Refuse what can be no ``device_map``: not a word of transformers', a device or a mapping.

    Raises:
        ConfigError: Says what it can be.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    words = () if isinstance(device_map, Mapping) else (None, *_SPREADS)
    for place in places:
        is_number = isinstance(place, int) and not isinstance(place, bool) and place >= 0
        if place not in words and not is_number and not _DEVICE.fullmatch(str(place)):
            raise ConfigError(
                f"device_map must be one of {', '.join(_SPREADS)}, a device, or a mapping of modules "
                f"to devices (a number, cpu, disk, cuda:N); got {place!r}"
            )


_DEVICE = re.compile(r"(cpu|disk|(cuda|xpu|mps|npu)(:\d+)?)")


def _options(asked: _Asked, revision: str | None) -> tuple[dict[str, Any], Options]:
    """The probe's own settings and the options; ``reachability: {n_pos: 24}`` is an option."""
    from workbench.models.load import BACKENDS, DTYPES

    names = {field.name for field in fields(Options)} - {"revision", "cache"}
    own = {name: value for name, value in asked.settings.items() if name not in names}
    mine = {name: value for name, value in asked.settings.items() if name in names}
    options: Options = make_config(
        Options, {**asked.options, **mine, "revision": revision}, "a sweep"
    )
    if options.dtype not in DTYPES:
        raise UnknownNameError("dtype", options.dtype, DTYPES)
    if options.backend not in BACKENDS:
        raise UnknownNameError("backend", options.backend, BACKENDS)
    return own, options


def _config(probe: Probe, settings: Mapping[str, Any], data: Any) -> Any:
    name = probe.name
    if probe.is_toy:
        raise ConfigError(
            f"a sweep runs probes; {name} is a toy task; use: workbench train {name} -o DIR"
        )
    if data is None and probe.needs_data:
        raise DataError(
            f"{name} needs prompts; the plan has no data for it; add data: builtin:natural"
        )
    return make_config(probe.config, settings, name)


def _intervention(item: Any) -> tuple[dict[str, Any] | None, str]:
    """Content and name of an intervention: ``none``, a file, or a mapping in the plan itself."""
    if item is None or item == "none":
        return None, "none"
    from workbench.interventions.files import from_content  # imports torch

    if isinstance(item, Mapping):
        content, label = dict(item), str(item.get("name"))
    elif isinstance(item, str):
        content, label = read_document(item), Path(item).name
    else:
        raise ConfigError(f"an intervention must be none, a file or a mapping; got {item!r}")
    from_content(content)
    return content, label
