"""Results as files for other programs and for people: JSON, CSV, Parquet, HTML, PNG, SVG."""

import csv
import html
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.result import SHORT_KEY, Result, missing_package
from workbench.store.files import explained, replace_file
from workbench.store.strict_json import jsonable, to_json

# Whatever a stored text says, a page may load nothing from anywhere. Plotly compiles its WebGL
# shaders with eval and keeps images in data: and blob: addresses.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; worker-src blob:"
)
_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
td, th { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
"""


def save(result: Result, path: Path) -> None:
    """Write a result in the format that the file's suffix names, whole or not at all.

    Raises:
        WorkbenchError: An unknown suffix, a package or browser that is missing, or a place that
            cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise WorkbenchError(f"a result's file must end in {', '.join(FORMATS)}; got {path.name!r}")
    data = FORMATS[suffix](result)
    with explained("write", path):
        replace_file(path, data)


def to_json_file(result: Result) -> bytes:
    """``result.json`` and the arrays as nested lists; NaN is null."""
    content = result.document()
    content["arrays"] = {name: jsonable(result.arrays[name]) for name in sorted(result.arrays)}
    return (to_json(content) + "\n").encode()


def to_csv(result: Result) -> bytes:
    """The headline table as comma-separated values."""
    table = result.table()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue().encode()


def to_parquet(result: Result) -> bytes:
    """The headline table as a Parquet file.

    Raises:
        WorkbenchError: pyarrow is not installed.
    """
    frame = result.to_dataframe()
    buffer = io.BytesIO()
    try:
        frame.to_parquet(buffer, index=False)
    except ImportError as error:
        raise WorkbenchError(missing_package("a .parquet file", "pyarrow", "view")) from error
    return buffer.getvalue()


def to_html(result: Result) -> bytes:
    """One self-contained page: headline numbers, figures, provenance; it loads nothing."""
    title = f"{result.probe} on {result.model}" if result.model else result.probe
    return html_page(title, html_fragment(result, plotly_js=True)).encode()


def html_page(title: str, body: str) -> str:
    """A whole page around ``body``, which must be HTML already; ``title`` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def html_fragment(result: Result, *, plotly_js: bool) -> str:
    """The part of a page that shows one result, every text in it escaped.

    Args:
        result: What to show.
        plotly_js: Include plotly's own JavaScript (4 MB); once per page, with its first figure.
    """
    parts = [html_metrics(result.metrics())]
    for name, figure in result.figures().items():
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=plotly_js, config={"displaylogo": False}
        )
        parts.append(f"<h3>{html.escape(name.replace('_', ' '))}</h3>\n{drawn}")
        plotly_js = False
    parts.append("<h2>Settings and provenance</h2>")
    identity = {"key": result.key, "probe": result.probe, "version": result.version}
    parts.append(html_pairs({**identity, **result.config, **result.provenance}))
    return "\n".join(parts)


def html_metrics(metrics: Mapping[str, float]) -> str:
    """A table of headline numbers."""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{value:.6g}</td></tr>'
        for name, value in metrics.items()
    )
    return f"<table><tr><th>metric</th><th>value</th></tr>{rows}</table>"


def html_pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values; texts as they are, anything else as JSON."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(_as_text(value))}</code></td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _to_image(kind: str) -> Callable[[Result], bytes]:
    def draw(result: Result) -> bytes:
        figures = list(result.figures().values())
        if not figures:
            raise WorkbenchError(
                f"a .{kind} needs a figure; result {result.key[:SHORT_KEY]} of {result.probe} "
                "has none, save it as .html or .json"
            )
        try:
            return figures[0].to_image(format=kind)
        # What plotly raises without kaleido (ValueError) and without a browser (RuntimeError).
        except (ImportError, ValueError, RuntimeError) as error:
            raise WorkbenchError(
                f"a .{kind} is drawn by kaleido in Chrome or Chromium, which failed here; run: "
                "pip install 'interpretability-workbench[view,images]', then plotly_get_chrome "
                "(or install Chromium); a .html needs neither"
            ) from error

    return draw


FORMATS: dict[str, Callable[[Result], bytes]] = {
    ".csv": to_csv,
    ".html": to_html,
    ".json": to_json_file,
    ".parquet": to_parquet,
    ".png": _to_image("png"),
    ".svg": _to_image("svg"),
}
"""What writes each kind of file, by suffix."""
