"""``workbench list``: what there is to choose from."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from workbench.cli import options as given
from workbench.cli.console import print_json, print_table
from workbench.errors import UnknownNameError

Rows = list[dict[str, Any]]


def list_command(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="probes, tasks, interventions, sites or datasets.")
    ],
    as_json: given.AsJson = False,
) -> None:
    """List the probes, tasks, interventions, sites or datasets."""
    if what not in LISTS:
        raise UnknownNameError("list", what, LISTS)
    rows = LISTS[what]()
    if as_json:
        print_json({what: rows})
        return
    shown = [name for name in rows[0] if name != "settings"]
    print_table(shown, [[_as_text(row[name]) for name in shown] for row in rows])


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple | frozenset):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: ""}[value]
    return str(value)


def _probes() -> Rows:
    from workbench.discovery import load_probes
    from workbench.settings import describe_settings

    return [
        {
            "name": probe.name,
            "measures": probe.summary,
            "paper": probe.paper,
            "version": probe.version,
            "needs": sorted(probe.needs),
            "data": probe.needs_data,
            "optional_data": probe.takes_data and not probe.needs_data,
            "settings": describe_settings(probe.config),
        }
        for probe in load_probes()
    ]


def _tasks() -> Rows:
    from workbench.cli.train import TOYS

    return [{"name": name, "trains": toy.summary} for name, toy in TOYS.items()]


def _interventions() -> Rows:
    import dataclasses

    from workbench.interventions.files import INTERVENTIONS

    return [
        {
            "name": name,
            "does": (kind.__doc__ or "").strip().splitlines()[0],
            "takes": [field.name for field in dataclasses.fields(kind) if field.name != "name"],
        }
        for name, kind in sorted(INTERVENTIONS.items())
    ]


def _sites() -> Rows:
    from workbench.models.base import LAYER_SITES, MODEL_SITES, TRANSFORMER_LENS_NAMES

    def rows(sites: Mapping[str, str], ours: str, theirs: str) -> Rows:
        return [
            {
                "name": ours + name,
                "holds": meaning,
                "in TransformerLens": theirs + TRANSFORMER_LENS_NAMES[name],
            }
            for name, meaning in sites.items()
        ]

    return rows(MODEL_SITES, "", "") + rows(LAYER_SITES, "L0.", "blocks.0.")


def _datasets() -> Rows:
    from workbench.sources import dataset_names

    return [{"name": name, "holds": holds} for name, holds in dataset_names().items()]


LISTS: dict[str, Callable[[], Rows]] = {
    "probes": _probes,
    "tasks": _tasks,
    "interventions": _interventions,
    "sites": _sites,
    "datasets": _datasets,
}
"""What can be listed."""


def probe_settings(name: str) -> list[tuple[str, str]]:
    """Each setting of a probe as ``--help`` shows it: what to write, and what it means."""
    from workbench.discovery import find_probe
    from workbench.settings import describe_settings

    return [
        (
            f"--set {row['name']}={_range_text(row)}",
            f"{row['help'] or ''}  [default: {_as_text(row['default']) or 'none'}]",
        )
        for row in describe_settings(find_probe(name).config)
    ]


def _range_text(row: Mapping[str, Any]) -> str:
    if row["choices"]:
        return "|".join(map(str, row["choices"]))
    kind = str(row["type"]).replace("NoneType", "none").replace(" or ", "|")
    low, high = row["low"], row["high"]
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    if low is not None:
        return f"{kind} from {low:g}"
    return kind if high is None else f"{kind} up to {high:g}"
