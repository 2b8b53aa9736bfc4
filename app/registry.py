"""The probes and toy tasks that get a page, their names found without importing torch."""

import importlib.util
import re
from importlib.metadata import entry_points
from pathlib import Path

import streamlit as st

from workbench.discovery import ENTRY_POINTS, TOY_TASKS, find_probe
from workbench.registry import Probe

_ANNOUNCED = re.compile(r'^@probe\(\s*"([\w-]+)"', re.MULTILINE)


@st.cache_resource(show_spinner=False)
def probe_names() -> tuple[str, ...]:
    """Every probe, ours and third parties', by name."""
    spec = importlib.util.find_spec("probes")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    names = {point.name for point in entry_points(group=ENTRY_POINTS)}
    for folder in folders:
        for source in folder.glob("*.py"):
            names.update(_ANNOUNCED.findall(source.read_text("utf-8")))
    return tuple(sorted(names))


def toy_names() -> tuple[str, ...]:
    """Every toy task."""
    return tuple(sorted(TOY_TASKS))


def probe_of(name: str) -> Probe:
    """A probe or a toy task; imports what it needs.

    Raises:
        UnknownNameError: There is none of the name.
    """
    return find_probe(name)
