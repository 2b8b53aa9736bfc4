"""``workbench run --revision A,B,C``: one probe on several revisions of a model."""

import csv
import html
import inspect
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.card import number_text
from workbench.cli import options as given
from workbench.cli.console import message, print_json, print_table, reporting
from workbench.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from workbench.result import Result
    from workbench.store.results import Store


@dataclass(frozen=True)
class Shown:
    """How the results are written and printed."""

    output: Path | None
    kind: str | None
    as_json: bool
    progress: str


def run_revisions(
    probe: str, model: str, request: Mapping[str, Any], store: "Store", shown: Shown
) -> None:
    """Run a probe on each revision, keep every result, and show them together.

    Args:
        probe: Its name.
        model: A hub id or ``toy:DIR``.
        request: What ``workbench.run.run`` is given by name; ``revision`` is a comma list.
        store: Where the results go.
        shown: Where the whole goes.

    Raises:
        ConfigError: Less than two revisions, one twice, or a folder that has one only.
    """
    from workbench.run import run

    names = _names(str(request["revision"]), model)
    write = _writer(shown)
    results, start = [], time.perf_counter()
    with reporting(shown.progress) as reporter, given.offering_models(model):
        for index, name in enumerate(names):
            reporter.message(f"revision {name} ({index + 1} of {len(names)})")
            how = {**request, "revision": name}
            try:
                results.append(run(probe, model, store=store, reporter=reporter, **how))
            except UnknownNameError:
                given.offer_nearest(probe, set(how) - _of_the_run())
                raise
    if write is not None:
        write(names, results)
    if shown.as_json:
        print_json(_as_json(names, results, time.perf_counter() - start))
        return
    metrics = [result.metrics() for result in results]
    rows = [(name, *(number_text(found[name]) for found in metrics)) for name in metrics[0]]
    print_table(("metric", *names), rows)
    if shown.output is not None:
        message(f"written: {shown.output}")


def _of_the_run() -> set[str]:
    from dataclasses import fields

    from workbench.requests import Options

    return {field.name for field in fields(Options)} | {"data", "intervention"}


def _names(text: str, model: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(
            f"--revision must be one revision, or different ones with commas between; got {text!r}"
        )
    from workbench.models.names import resolve_model
    from workbench.models.toy_folder import is_toy_folder

    place = resolve_model(model)
    if Path(place).is_dir() and not is_toy_folder(place):
        raise ConfigError(
            f"--revision A,B,C needs a model of the hub or a toy with checkpoints; the folder {model} "
            "has one revision; run the probe on each folder"
        )
    return names


Write = Callable[[Sequence[str], Sequence["Result"]], bytes]


def _writer(shown: Shown) -> Callable[[Sequence[str], Sequence["Result"]], None] | None:
    """What writes all results to one file, checked before anything is computed."""
    output = shown.output
    if output is None:
        if shown.kind is not None:
            raise ConfigError("--format with several revisions needs a file; give -o PATH")
        return None
    suffix = f".{shown.kind.lower().lstrip('.')}" if shown.kind else output.suffix.lower()
    if suffix not in FORMATS:
        known = [name.lstrip(".") for name in FORMATS]
        raise UnknownNameError("file format of several revisions", suffix.lstrip("."), known)
    given.check_output(output)

    def write(names: Sequence[str], results: Sequence["Result"]) -> None:
        given.write_output(output, FORMATS[suffix](names, results))

    return write


def _as_json(names: Sequence[str], results: Sequence["Result"], seconds: float) -> dict[str, Any]:
    found = [
        {"revision": name, "key": result.key, "metrics": result.metrics(), "path": result.path}
        | {"cached": result.cached}
        for name, result in zip(names, results, strict=True)
    ]
    return {"probe": results[0].probe, "revisions": found, "seconds": round(seconds, 3)}


def _to_json(names: Sequence[str], results: Sequence["Result"]) -> bytes:
    from workbench.store.strict_json import to_json

    pairs = zip(names, results, strict=True)
    documents = [{"revision": name, **result.document()} for name, result in pairs]
    return (to_json(documents) + "\n").encode()


def _to_csv(names: Sequence[str], results: Sequence["Result"]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, result in zip(names, results, strict=True):
        table = result.table()
        if name == names[0]:
            writer.writerow(["revision", *table])
        writer.writerows([name, *row] for row in zip(*table.values(), strict=True))
    return text.getvalue().encode()


def _to_html(names: Sequence[str], results: Sequence["Result"]) -> bytes:
    """The curves over revisions where the probe draws some, then every revision's own page."""
    from workbench.discovery import find_figures, find_probe
    from workbench.store.formats import html_fragment, html_page

    module = inspect.getmodule(find_figures(find_probe(results[0].probe)))
    draw = getattr(module, "figures_over_revisions", None)
    drawn = {} if draw is None else draw([result.measured for result in results], names)
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0, config={"displaylogo": False})
        for index, figure in enumerate(drawn.values())
    ]
    for name, result in zip(names, results, strict=True):
        parts.append(f"<h2>revision {html.escape(name)}</h2>")
        parts.append(html_fragment(result, plotly_js=not parts[:-1]))
    title = f"{results[0].probe}: {len(names)} revisions of {results[0].model.split('@')[0]}"
    return html_page(title, "\n".join(parts)).encode()


FORMATS: dict[str, Write] = {".csv": _to_csv, ".html": _to_html, ".json": _to_json}
"""What writes several results into one file, by suffix."""
