"""The lists of probes and toy tasks: how one announces itself and how it is found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.errors import UnknownNameError

_PROBES: dict[str, "Probe"] = {}
_TOYS: dict[str, "Probe"] = {}


@dataclass(frozen=True)
class Probe:
    """A measurement: a probe of any model that has what it needs, or a toy task's training run.

    Results of both lie in the same store and are drawn and shown in the same way.
    """

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
    """``measure_<topic>(model, tokens, config, context) -> result``, or a toy task's
    ``train_<topic>(config, out_dir, progress) -> result``."""
    needs: frozenset[str]
    """Names from ``workbench.models.base.CAPABILITIES``."""
    needs_data: bool
    """False for probes that read weights only, and for toy tasks."""
    takes_data: bool = True
    """Whether prompts are used when they are given; always true where they are needed."""
    is_toy: bool = False

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
    takes_data: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated measuring function as probe ``name``; see ``Probe`` for the rest."""

    def register(measure: Callable[..., Any]) -> Callable[..., Any]:
        summary = (measure.__doc__ or "").strip().split("\n")[0]
        _PROBES[name] = Probe(
            name,
            summary,
            paper,
            version,
            config,
            result,
            measure,
            frozenset(needs),
            needs_data,
            needs_data or takes_data,
        )
        return measure

    return register


def toy_task(
    name: str, *, config: type, result: type, paper: str, version: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated training function as toy task ``name``; see ``Probe`` for the rest."""

    def register(train: Callable[..., Any]) -> Callable[..., Any]:
        summary = (train.__doc__ or "").strip().split("\n")[0]
        _TOYS[name] = Probe(
            name, summary, paper, version, config, result, train, frozenset(), False, False, True
        )
        return train

    return register


def get_probe(name: str) -> Probe:
    """Return the probe or toy task called ``name``; ``UnknownNameError`` offers the nearest."""
    known = _PROBES | _TOYS
    if name not in known:
        raise UnknownNameError("probe", name, known)
    return known[name]


def all_probes() -> list[Probe]:
    """All registered probes, by name."""
    return [_PROBES[name] for name in sorted(_PROBES)]


def all_toys() -> list[Probe]:
    """All registered toy tasks, by name."""
    return [_TOYS[name] for name in sorted(_TOYS)]
