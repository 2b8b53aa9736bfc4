"""One page for a whole store: what was found, the figures, and what produced them.

The page needs no network and no server. plotly's JavaScript is in it once, and a figure is drawn
when the reader comes near it, so that a page of a hundred figures opens at once.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.components.text import flat
from workbench.errors import StoreError, WorkbenchError
from workbench.result import SHORT_KEY, Result, missing_package
from workbench.store.files import explained, replace_file
from workbench.store.formats import html_metrics, html_page, html_pairs
from workbench.store.results import Store

TITLE = "Interpretability workbench"

# What drawing code raises on arrays of a shape it was not written for: results may have been
# imported from elsewhere, and one of them must not take the others' page away.
_UNDRAWABLE = (WorkbenchError, LookupError, TypeError, ValueError, RuntimeError, AttributeError)

_ROOM_PX = 52
"""Above a figure: plotly's buttons, and the names of small multiples under them."""

_STYLE = """
:root { color-scheme: light dark; }
h1, h2, h3, li { overflow-wrap: anywhere; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 2px solid #8884; }
h3 { margin: 2rem 0 0.2rem; }
li { margin: 0.5rem 0; line-height: 1.45; }
p.caption, p.note { margin: 0 0 0.4rem; font-size: 0.9rem; opacity: 0.8; max-width: 48rem; }
summary { cursor: pointer; padding: 0.4rem 0; }
table { font-size: 0.9rem; }
td, th { border-color: #8886; }
.figure { overflow-x: auto; }
.figure .infolayer text, .figure .cartesianlayer text, .figure .table text {
  fill: currentColor !important;
}
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #15171a; }
  a { color: #8ab8ff; }
}
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 0.7rem; } }
"""

_DRAW = """
const draw = (place) => {
  const figure = JSON.parse(place.querySelector("script").textContent);
  place.replaceChildren();
  const narrow = place.clientWidth < 600;
  if (narrow) {
    figure.layout.height += 70;  // the legend needs more lines
    figure.layout.margin = {...figure.layout.margin, t: 28};
    if (figure.data[0].type === "table") figure.layout.width = 640;  // scrolls in its place
  }
  const bar = {displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"]};
  const shown = narrow ? {displayModeBar: false} : bar;
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, ...shown});
};
const near = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    near.unobserve(entry.target);
    draw(entry.target);
  }
}, {rootMargin: "1000px"});
for (const place of document.querySelectorAll(".figure")) near.observe(place);
addEventListener("beforeprint", () => {
  near.disconnect();
  document.querySelectorAll(".figure:not(.js-plotly-plot)").forEach(draw);
});
"""


@dataclass(frozen=True)
class _Section:
    """What the page shows of one result, as HTML."""

    result: Result
    finding: str
    """One sentence, plain text."""
    figures: str

    @property
    def heading(self) -> str:
        # A toy task is its own model.
        named = self.result.model not in ("", self.result.probe)
        model = f" on {self.result.model}" if named else ""
        return html.escape(f"{self.result.probe}{model}")


def write_report(
    store: Store,
    path: str | Path,
    *,
    title: str = TITLE,
    keys: Sequence[str] | None = None,
    missing: Sequence[str] = (),
) -> Path:
    """Write the results of a store on one self-contained page, whole or not at all.

    Args:
        store: Where the results are.
        path: The page.
        title: Its title.
        keys: Which results, and in which order; None: all of them, the newest first. A beginning
            of a key is enough.
        missing: What was asked for and has no result, one line each; listed as left out.

    Raises:
        StoreError: The store is empty, a key is not in it, or the page cannot be written.
        WorkbenchError: plotly is not installed.
    """
    script = _plotly_script()
    chosen, left_out = _choose(store, keys)
    left_out += missing
    sections = []
    for key in chosen:
        try:
            sections.append(_section(store.get(key)))
        except _UNDRAWABLE as error:
            left_out.append(_reason(key, error))
    if not sections and not left_out:
        raise StoreError(
            f"a report needs at least one result; {store.path} has none; run one first: "
            "workbench run attention-sinks --model demo --data builtin:natural"
        )
    body = "\n".join(_body(sections, left_out, script))
    with explained("write", Path(path)):
        replace_file(Path(path), html_page(title, body).encode())
    return Path(path)


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise WorkbenchError(missing_package("a report", "plotly", "view")) from error
    return str(get_plotlyjs())


def _choose(store: Store, keys: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The keys to show, and what the store says about results that it cannot list."""
    if keys is not None:
        return [store.resolve(key) for key in keys], []
    reports: list[str] = []
    # A second view of the same folder, so that what it reports reaches the page too.
    listed = Store(store.path, report=reports.append).list()
    for report in reports:
        store.report(report)
    return [entry.key for entry in listed], reports


def _reason(key: str, error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if not isinstance(error, WorkbenchError):
        text = f"its figures cannot be drawn ({type(error).__name__}: {text})"
    return text if key[:SHORT_KEY] in text else f"result {key[:SHORT_KEY]}: {text}"


# One result


def _section(result: Result) -> _Section:
    drawn = "\n".join(_figure(name, figure) for name, figure in result.figures().items())
    return _Section(result, result.finding(), drawn)


def _figure(name: str, figure: Any) -> str:
    """A place for a figure and its data; the title is text of the page, which wraps on a phone."""
    title = figure.layout.title.text or name.replace("_", " ")
    caption = figure.layout.title.subtitle.text or ""
    height = int(figure.layout.height or 450)
    if figure.layout.title.text:
        taken = int(figure.layout.margin.t or 80) - _ROOM_PX
        height -= taken
        figure.update_layout(title=None, margin_t=_ROOM_PX)
    figure.update_layout(height=height)
    # In a script element only "<" could end the data early.
    data = figure.to_json().replace("<", "\\u003c")
    return (
        f'<h3>{_plain(title)}</h3>\n<p class="caption">{_plain(caption)}</p>\n'
        f'<div class="figure" style="min-height:{height}px">'
        f'<script type="application/json">{data}</script></div>'
    )


def _plain(text: str) -> str:
    """A title of a figure, which is markup to plotly, as text of the page."""
    return html.escape(html.unescape(re.sub(r"</?(?:br|b|i)>", " ", text)), quote=False)


# The page


def _body(sections: Sequence[_Section], left_out: Sequence[str], script: str) -> Iterator[str]:
    yield f"<style>{_STYLE}</style>"
    yield "<noscript><p>The figures need JavaScript, which is in this page.</p></noscript>"
    yield "<h2>Findings</h2>"
    yield "<ul>" if sections else "<p>No result could be shown.</p><ul>"
    for section in sections:
        link = f'<a href="#{section.result.key}">{section.heading}</a>'
        yield f"<li>{link}: {html.escape(section.finding)}</li>"
    yield "</ul>"
    if left_out:
        yield "<h2>Left out</h2>\n<ul>"
        yield from (f"<li>{html.escape(reason)}</li>" for reason in left_out)
        yield "</ul>"
    for section in sections:
        yield from _section_html(section)
    yield f"<script>{script}</script>\n<script>{_DRAW}</script>"


def _section_html(section: _Section) -> Iterator[str]:
    result = section.result
    yield f'<section id="{html.escape(result.key)}"><h2>{section.heading}</h2>'
    yield f"<p>{html.escape(section.finding)}</p>"
    yield section.figures or '<p class="note">This probe draws no figures.</p>'
    yield f"<details open><summary>Numbers</summary>{html_metrics(result.metrics())}</details>"
    identity = {"key": result.key, "probe": result.probe, "version": result.version}
    # The provenance repeats what the table shows already.
    made_by = {
        name: value
        for name, value in result.provenance.items()
        if name not in {"config", *identity}
    }
    yield "<details><summary>Settings and provenance</summary>"
    rows = dict(flat({**identity, "config": result.config, **made_by}))
    yield f"{html_pairs(rows)}</details></section>"
