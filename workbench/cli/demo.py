"""``workbench demo``: the main job on the embedded model, without a network."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.console import message, print_table, reporting
from workbench.cli.report import write_report
from workbench.errors import CapabilityError, ConfigError, DataError

if TYPE_CHECKING:
    from workbench.registry import Probe
    from workbench.result import Result

N_POS = 64
"""Tokens of a prompt, as in the attention-sinks paper."""


@dataclass(frozen=True)
class Recipe:
    """How the demo runs one probe."""

    data: Any
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, tuple[Recipe, ...]] = {
    "activation-attacks": (
        Recipe(
            None,
            {
                "n_attacked": (1, 2),
                "n_seeds": 2,
                "context": 16,
                "steps": 60,
                "t_limit": 16,
                "shortlist": 32,
                "token_limit": 2,
            },
        ),
    ),
    "attention-sinks": (
        Recipe("builtin:natural", {"n_pos": N_POS}),
        Recipe("builtin:natural", {"n_pos": N_POS, "inputs": "random"}),
        Recipe("builtin:natural", {"n_pos": N_POS, "inputs": "repeat"}),
    ),
    "successor-heads": (Recipe("builtin:natural", {"n_pos": N_POS}),),
    "active-dormant": (
        Recipe({"prose": "builtin:natural", "code": "builtin:code"}, {"n_pos": N_POS}),
    ),
    "information-flow": (
        Recipe("builtin:items", {"knockout": True, "routes": True, "classifier_folds": 4}),
    ),
    "reachability": (
        Recipe(
            "builtin:natural",
            {
                "n_pos": 24,
                "limit": 8,
                "k_max": 4,
                "shortlist": 48,
                "candidates": 16,
                "iterations": 5,
                "batch": 32,
            },
        ),
    ),
}
"""Probes for which the plain recipe is not the best one."""

TOYS: dict[str, dict[str, str]] = {"bigram-backcopy": {}, "scan-snap": {}, "state-space": {}}
"""Toy tasks that the demo trains, with settings that take a minute."""


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of results and report.")
    ] = Path("demo"),
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="M", help="Another model than the embedded one.")
    ] = "demo",
) -> None:
    """Run every probe on the embedded model and train the toys, offline.

    Results go to DIR/store, figures to DIR/report.html. A second run finds everything there.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"-o must be a folder; {output} is a file; choose another name")
    from workbench.discovery import load_probes

    store = output / "store"
    with reporting("auto", live=True) as reporter:
        found = [
            result
            for probe in load_probes()
            for result in _run_probe(probe, model, store, reporter)
        ]
        found += [_run_toy(name, output, store, reporter) for name in TOYS]
    keys = [result.key for result in found]
    report = write_report(store, output / "report.html", "What the demo found", keys)
    print_table(("probe", "settings", "what it found", "key"), [_row(result) for result in found])
    message(f"\nreport: {report}")
    message(f"next: open {report} in a browser")
    message(f"      workbench results list --store {store}")
    message("      workbench run attention-sinks --model gpt2 --data my.txt")


def _run_toy(name: str, output: Path, store: Path, reporter: Any) -> "Result":
    """Train a toy task in DIR/toys; a finished run is only read again."""
    from workbench.cli.train import recorded
    from workbench.store.results import Store

    reporter.message(name)
    key = recorded(name, TOYS[name], output / "toys" / name, store).key
    return Store(store).get(key)


def _run_probe(probe: "Probe", model: str, store: Path, reporter: Any) -> Iterator["Result"]:
    from workbench.run import run

    plain = (Recipe("builtin:natural", {"n_pos": N_POS}) if probe.needs_data else Recipe(None),)
    for recipe in RECIPES.get(probe.name, plain):
        settings = " ".join(f"{name}={value}" for name, value in recipe.settings.items())
        reporter.message(f"{probe.name} {settings}".strip())
        try:
            yield run(
                probe.name, model, recipe.data, store=store, reporter=reporter, **recipe.settings
            )
        except (ConfigError, DataError, CapabilityError) as error:
            # A probe that wants other data or a larger model than ours is no failure of the demo.
            reporter.message(f"{probe.name} was left out: {error}")


def _row(result: "Result") -> tuple[str, str, str, str]:
    import dataclasses

    from workbench.discovery import find_probe
    from workbench.result import SHORT_KEY

    probe = find_probe(result.probe)
    defaults = dataclasses.asdict(probe.config())
    changed = [f"{k}={v}" for k, v in result.config.items() if v != defaults.get(k)]
    return result.probe, ", ".join(changed), result.finding(), result.key[:SHORT_KEY]
