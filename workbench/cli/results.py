"""``workbench results``: look at the store, take results out, keep it in order.

Results go to stdout and messages to stderr; nothing here imports torch, apart from exports that
need the probe's own code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.console import message, print_json, print_table
from workbench.cli.options import AsJson, StoreFolder
from workbench.errors import ConfigError
from workbench.result import SHORT_KEY
from workbench.store.results import Store
from workbench.store.strict_json import to_json

app = typer.Typer(help="List, show, export, check and clean the stored results.")

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="A key, or at least 6 characters of its beginning.")
]

_WIDTH = 200
"""Columns of a list that goes into a file or a pipe: a result a line."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _print_pairs(title: str, values: Mapping[str, Any]) -> None:
    if values:
        rows = [(name, _as_text(value)) for name, value in values.items()]
        print_table((title, ""), rows, least_width=_WIDTH)


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else to_json(value)


def _size_text(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@app.command("list")
def list_command(
    probe: Annotated[str | None, typer.Option(help="Only results of this probe.")] = None,
    model: Annotated[str | None, typer.Option(help="Only results on this model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, newest first.")] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """List the stored results, the newest first."""
    opened = Store(store)
    entries = opened.list(probe=probe, model=model, limit=limit)
    if as_json:
        results = [{**to_dict(entry), "path": opened.folder(entry.key)} for entry in entries]
        print_json({"store": opened.path, "results": results})
        return
    if not entries:
        message(f"no such results in {opened.path}")
        return
    rows = [
        (
            entry.key[:SHORT_KEY],
            entry.probe,
            entry.subject,
            entry.created[:19].replace("T", " "),
            _size_text(entry.size_bytes),
            entry.headline,
        )
        for entry in entries
    ]
    print_table(
        ("key", "probe", "model", "created (UTC)", "size", "headline"), rows, least_width=_WIDTH
    )


def to_dict(entry: Any) -> dict[str, Any]:
    """The fields of a line of the list."""
    fields = entry._asdict()
    return {
        "metrics" if name == "metrics_json" else name: value for name, value in fields.items()
    } | {"metrics": entry.metrics}


@app.command("show")
def show_command(key: KeyArgument, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Show the numbers, the arrays and the provenance of one result."""
    result = Store(store).get(key)
    shapes = result.array_shapes()
    if as_json:
        arrays = {name: {"dtype": kind, "shape": shape} for name, (kind, shape) in shapes.items()}
        print_json({**result.document(), "path": result.path, "arrays": arrays})
        return
    identity = {"key": result.key, "version": result.version, "path": str(result.path)}
    _print_pairs(result.probe, identity)
    _print_pairs("metric", result.metrics())
    _print_pairs("array", {name: f"{kind} {list(shape)}" for name, (kind, shape) in shapes.items()})
    _print_pairs("labels of", result.labels)
    _print_pairs("setting", result.config)
    _print_pairs("provenance", result.provenance)


@app.command("export")
def export_command(
    key: KeyArgument,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH]",
            help="A .json, .csv, .parquet, .html, .png, .svg, .zip, or a new folder.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The same as PATH.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="The format, if the name of PATH does not say.")
    ] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write one result to a file or a folder; the suffix chooses the format."""
    opened = Store(store)
    key = opened.resolve(key)
    path = output or target or Path(f"{opened.get(key).probe}-{key[:SHORT_KEY]}")
    if kind and path.suffix.lower() != f".{kind.lower()}":
        path = path.with_name(f"{path.name}.{kind.lower()}")
    opened.export(key, path)
    typer.echo(to_json({"key": key, "path": path}) if as_json else str(path))


@app.command("verify")
def verify_command(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Check every byte of every result; damaged results are set aside (exit code 1)."""
    opened = Store(store)
    found = opened.verify()
    for reason in (*found.damaged.values(), *found.unreadable.values()):
        message(reason)
    if as_json:
        print_json({"store": opened.path, **vars(found)})
    else:
        bad, unread = len(found.damaged), len(found.unreadable)
        typer.echo(
            f"{_plural(len(found.whole), 'whole result')}, {bad} damaged, {unread} unreadable"
        )
    if found.damaged or found.unreadable:
        raise typer.Exit(1)


@app.command("gc")
def gc_command(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove results older than 12h, 30d, 8w, ...")
    ] = None,
    keep_latest: Annotated[
        int | None,
        typer.Option(min=0, help="Keep the newest N of each probe and model, whatever their age."),
    ] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Remove damaged results too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove old results and what crashes left behind; never what is being computed."""
    opened = Store(store)
    age = None if older_than is None else _seconds(older_than)
    found = opened.gc(older_than=age, keep_latest=keep_latest, damaged=damaged, dry_run=dry_run)
    if as_json:
        print_json({"store": opened.path, "dry_run": dry_run, **vars(found)})
        return
    for name in (*found.removed, *found.leftovers):
        typer.echo(name)
    verb = "would remove" if dry_run else "removed"
    message(
        f"{verb} {_plural(len(found.removed), 'result')} and "
        f"{_plural(len(found.leftovers), 'leftover')}, {_size_text(found.freed_bytes)}; "
        f"kept {len(found.leased)} in use"
    )


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if match is None:
        raise ConfigError(f"an age must be a number and one of s, m, h, d, w (30d); got {age!r}")
    return float(match[1]) * _SECONDS[match[2]]


@app.command("rebuild")
def rebuild_command(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Make the catalogue anew from the results; it is a copy and can always be rebuilt."""
    opened = Store(store)
    number = opened.rebuild()
    if as_json:
        print_json({"store": opened.path, "results": number})
    else:
        typer.echo(f"{_plural(number, 'result')} in {opened.path}")


@app.command("import")
def import_command(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="A result's folder, a store, a .zip or a .tar.")
    ],
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Check results made elsewhere and take them over."""
    opened = Store(store)
    found = opened.import_from(source)
    if as_json:
        print_json({"store": opened.path, **vars(found)})
        return
    for key in found.added:
        typer.echo(key)
    message(f"imported {_plural(len(found.added), 'result')}; {len(found.present)} were here")
