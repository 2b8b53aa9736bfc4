"""The list of probes: how one announces itself and how it is found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.errors import UnknownNameError

_PROBES: dict[str, "Probe"] = {}


@dataclass(frozen=True)
class Probe:
    """A measurement that can be run on any model which has what it needs."""

    name: str
    summary: str
    """First line of the measuring function's docstring; helps to choose between two probes."""
    paper: str
    """"arXiv:..." or "doi:..."."""
    version: int
    """Raised whenever the numbers change; part of every result's key."""
    config: type
    """Frozen dataclass; its fields are the probe's settings."""
    result: type
    """Frozen dataclass of tensors with ``metrics()`` and ``table()``."""
    measure: Callable[..., Any]
    """``measure_<topic>(model, tokens, config) -> result``."""
    needs: frozenset[str]
    """Names from ``workbench.models.base.CAPABILITIES``."""
    needs_data: bool
    """False for probes that read weights only."""

    @property
    def topic(self) -> str:
        """The name as a module name."""
        return self.name.replace("-", "_")


def probe(
    name: str,
    *,
    config: type,
    result: type,
    paper: str,
    version: int = 1,
    needs: frozenset[str] | set[str] = frozenset({"capture"}),
    needs_data: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated measuring function as probe ``name``; see ``Probe`` for the rest."""

    def register(measure: Callable[..., Any]) -> Callable[..., Any]:
        summary = (measure.__doc__ or "").strip().split("\n")[0]
        _PROBES[name] = Probe(
            name, summary, paper, version, config, result, measure, frozenset(needs), needs_data
        )
        return measure

    return register


def get_probe(name: str) -> Probe:
    """Return the probe called ``name``; ``UnknownNameError`` offers the nearest."""
    if name not in _PROBES:
        raise UnknownNameError("probe", name, _PROBES)
    return _PROBES[name]


def all_probes() -> list[Probe]:
    """All registered probes, by name."""
    return [_PROBES[name] for name in sorted(_PROBES)]
