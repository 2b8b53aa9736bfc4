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
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from workbench.discovery import find_probe
from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.execute.cell import Cell
from workbench.models.names import resolve_model
from workbench.provenance import canonical_json, content_key
from workbench.raw_prompts import raw_hash
from workbench.requests import Options
from workbench.revisions import folder_revision, resolve_hub_revision
from workbench.settings import make_config
from workbench.sources import read_source

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
    maker = _CellMaker(hashes)
    cells: dict[str, Cell] = {}
    for asked in _combinations(document):
        cell = maker.make(asked)
        cells.setdefault(cell.key, cell)
    return Plan(tuple(cells.values()), dict(document))


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
    intervention: Any
    device_map: Any


def _combinations(document: Mapping[str, Any]) -> Iterator[_Asked]:
    probes = _probes(document["probes"])
    shared = {option: document[name] for name, option in AXES.items() if name in document}
    shared |= {name: document[name] for name in SINGLE if name in document}
    interventions = _as_list(document.get("interventions", "none"))
    for model in _as_list(document["models"]):
        for options in _product(shared):
            for item in interventions:
                for name, settings in probes.items():
                    for data in _data_of(name, document.get("data"), probes):
                        for own in _product(settings):
                            place = document.get("device_map")
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
    """Checks and keys cells; each file is read once."""

    def __init__(self, hashes: Path | None) -> None:
        self._hashes = hashes
        self._data: dict[str, str] = {}
        self._weights: dict[tuple[str, str | None], str | None] = {}

    def make(self, asked: _Asked) -> Cell:
        probe, data = asked.probe, asked.data
        if not isinstance(asked.model, str) or not asked.model:
            raise ConfigError(f"a model must be a name or a folder; got {asked.model!r}")
        name, revision = split_revision(asked.model)
        own, options = _options(asked, revision)
        config = _config(probe, own, data)
        data = data if find_probe(probe).takes_data else None
        content, label = _intervention(asked.intervention)
        numbers = {k: v for k, v in asdict(options).items() if k not in _NOT_NUMBERS}
        key = content_key(
            {
                "probe": [probe, find_probe(probe).version],
                "config": asdict(config),
                "model": [name, self._revision(name, revision)],
                "data": self._hash(data, options.limit),
                "options": numbers,
                "intervention": content,
            }
        )
        defaults = asdict(Options())
        kept = {
            name: value
            for name, value in asdict(options).items()
            if value != defaults[name] or name in ("seed", "dtype")
        }
        return Cell(key, probe, name, data, own, kept, content, label, asked.device_map)

    def _hash(self, data: Any, limit: int | None) -> str | None:
        if data is None:
            return None
        asked = json.dumps([data, limit], sort_keys=True)
        if asked not in self._data:
            self._data[asked] = raw_hash(read_source(data, limit))
        return self._data[asked]

    def _revision(self, name: str, revision: str | None) -> str | None:
        if (name, revision) not in self._weights:
            folder = Path(resolve_model(name))
            self._weights[name, revision] = (
                folder_revision(folder, self._hashes)
                if folder.is_dir()
                else resolve_hub_revision(name, revision)
            )
        return self._weights[name, revision]


def split_revision(model: str) -> tuple[str, str | None]:
    """Part ``gpt2@main`` and ``toy:DIR@100``; a folder may have ``@`` in its name."""
    name, _, revision = model.rpartition("@")
    if not name or not revision or Path(resolve_model(model)).exists():
        return model, None
    return name, revision


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


def _config(name: str, settings: Mapping[str, Any], data: Any) -> Any:
    probe = find_probe(name)
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
    from workbench.interventions.files import INTERVENTIONS

    if item is None or item == "none":
        return None, "none"
    if isinstance(item, Mapping):
        content, label = dict(item), str(item.get("name"))
    elif isinstance(item, str):
        content, label = _read_intervention(Path(item)), Path(item).name
    else:
        raise ConfigError(f"an intervention must be none, a file or a mapping; got {item!r}")
    if not isinstance(content.get("name"), str) or content["name"] not in INTERVENTIONS:
        raise UnknownNameError("intervention", str(content.get("name")), INTERVENTIONS)
    return content, label


def _read_intervention(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"the intervention file must be readable; {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the intervention file must be JSON in UTF-8; {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"the intervention file must hold a mapping; {path} does not")
    return content
