"""Finds probes, toy tasks and their figures: ours and third parties' entry points.

A third party announces a probe module under the entry-point group ``workbench.probes``; its
figures, if any, are ``FIGURES`` in that module or a function ``figures(result)``.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from workbench.errors import UnknownNameError
from workbench.registry import Probe, all_probes, all_toys, get_probe

ENTRY_POINTS = "workbench.probes"


def _probe_modules() -> dict[str, str]:
    """Module by probe name, without importing any of them (``probes.attention_sinks``)."""
    found = importlib.util.find_spec("probes")
    paths = list(found.submodule_search_locations or []) if found else []
    modules = {
        info.name.replace("_", "-"): f"probes.{info.name}"
        for info in pkgutil.iter_modules(paths)
        if not info.ispkg
    }
    modules.update(_announced())
    return modules


@cache  # reading what every installed package announces takes 0.1 s; a sweep asks for each cell
def _announced() -> dict[str, str]:
    """Module by probe name, of third parties."""
    return {point.name: point.module for point in entry_points(group=ENTRY_POINTS)}


TOY_TASKS = {
    "bigram-backcopy": "toy_tasks.bigram_backcopy",
    "scan-snap": "toy_tasks.scan_snap",
    "scan-snap-sweep": "toy_tasks.scan_snap_panels",
    "scan-snap-text": "toy_tasks.scan_snap_text",
    "state-space": "toy_tasks.state_space",
}
"""Module by toy task; the package holds other modules too."""


def _toy_modules() -> dict[str, str]:
    return {name: module for name, module in TOY_TASKS.items() if importlib.util.find_spec(module)}


def load_toys() -> list[Probe]:
    """Import every toy task's module and return all toy tasks, by name."""
    for module in _toy_modules().values():
        importlib.import_module(module)
    return all_toys()


def find_probe(name: str) -> Probe:
    """Import the module of one probe or toy task and return it.

    Raises:
        UnknownNameError: No probe has the name; the nearest is offered.
    """
    modules = _probe_modules() | _toy_modules()
    if name in modules:
        importlib.import_module(modules[name])
        return get_probe(name)
    known = load_probes()
    if name not in {probe.name for probe in known}:
        raise UnknownNameError("probe", name, [probe.name for probe in known])
    return get_probe(name)


def load_probes() -> list[Probe]:
    """Import every probe module and return all probes, by name."""
    for module in _probe_modules().values():
        importlib.import_module(module)
    return all_probes()


def probe_source(name: str) -> Path | None:
    """The file that defines probe ``name``, found without importing it (None: no such module)."""
    module = _probe_modules().get(name)
    spec = importlib.util.find_spec(module) if module else None
    return Path(spec.origin) if spec and spec.origin else None


def find_figures(probe: Probe) -> Callable[[Any], dict[str, Any]] | None:
    """The function that draws a probe's result: ``figures(result) -> dict of plotly Figures``.

    None where the probe has no figures.
    """
    own = importlib.import_module(probe.measure.__module__)
    if hasattr(own, "figures"):
        return own.figures
    module = f"probes.figures.{probe.topic}"
    try:
        return importlib.import_module(module).figures
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
