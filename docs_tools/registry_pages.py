"""Pages made from the registries: a toy, an intervention, and the settings of everything."""

import re
import sys
from pathlib import Path
from typing import Any

from docs_tools.markdown import arrays_table, from_docstring, settings_table
from workbench.registry import Probe

ROOT = Path(__file__).parents[1]


def module_text(kind: Any) -> str:
    """The docstring of the module that defines something: formula, paper, departures."""
    return from_docstring(sys.modules[kind.__module__].__doc__)


def source_of(kind: Any) -> str:
    """The file of a thing, from the root of the repository."""
    return str(kind.__module__).replace(".", "/") + ".py"


def from_the_code(probe: Probe) -> str:
    """What is appended to the hand-written page of a probe."""
    return "\n\n".join(
        (
            "## From the code",
            f"Version {probe.version} of `{probe.name}`, in `{source_of(probe.measure)}`. "
            f"Needs of a model: {', '.join(f'`{name}`' for name in sorted(probe.needs)) or 'nothing'}; "
            f"prompts: {'yes' if probe.needs_data else 'optional' if probe.takes_data else 'no'}.",
            module_text(probe.measure),
            "### Every setting",
            settings_table(probe.config),
            "### What is stored",
            arrays_table(probe.result),
        )
    )


def toy_page(toy: Probe, hand_written: str | None) -> str:
    """The page of a toy task."""
    more = f"Measured, with figures: [{hand_written}](../{hand_written})." if hand_written else ""
    return "\n\n".join(
        (
            f"# {toy.name}",
            f"{toy.summary} Paper: {toy.paper}. {more}",
            f"    workbench train {toy.name} -o DIR --set NAME=VALUE",
            module_text(toy.measure),
            "## Settings",
            settings_table(toy.config),
            "## What is stored",
            arrays_table(toy.result),
            f"Version {toy.version}, in `{source_of(toy.measure)}`.",
        )
    )


def toy_pages_of_readme() -> dict[str, str]:
    """Which hand-written page the README names for each toy."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("## Toy tasks")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| \[([\w-]+)\]\(docs/(.+?)\)", part, re.MULTILINE))


def intervention_page(name: str, kind: type) -> str:
    """The page of an intervention."""
    return "\n\n".join(
        (
            f"# {name}",
            from_docstring(kind.__doc__),
            f"    workbench generate --model demo --prompt TEXT --intervention {name} --set NAME=VALUE --compare",
            module_text(kind),
            "## Settings",
            settings_table(kind),
            f"In `{source_of(kind)}`. What is exact, and how to evaluate and calibrate: "
            "[Interventions](../interventions.md).",
        )
    )


def settings_page(groups: dict[str, dict[str, type]]) -> str:
    """Every config in one place, for looking things up."""
    parts = [
        "# Settings",
        "Made from the configs in the code; `workbench run PROBE --help` prints the same. On the command line "
        "`--set NAME=VALUE`, in Python `wb.run(probe, model, data, NAME=VALUE)`, in a plan `probe: {NAME: VALUE}`. "
        "A list is written with commas, an absent value as `none`.",
    ]
    for group, configs in groups.items():
        parts.append(f"## {group}")
        for name, config in configs.items():
            parts += [f"### {name}", settings_table(config)]
    return "\n\n".join(parts)
