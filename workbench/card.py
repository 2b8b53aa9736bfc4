"""How a result shows itself in a notebook: a short card, and under it the main figure; and its numbers everywhere."""

import html
import math
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.result import Result


def number_text(value: float) -> str:
    """A number for a table or a headline."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}"


def show(result: "Result") -> None:
    """Display a result in the running notebook; only its text where nothing can be drawn.

    The figure is displayed by plotly's own rules, so ``plotly.io.renderers.default`` (or
    ``PLOTLY_RENDERER``) says whether it is interactive, a PNG or an SVG.
    """
    # IPython alone calls this, and in a terminal plotly would open a browser at every echo.
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        print(repr(result))  # noqa: T201 - what a terminal shows of any value
        return
    figures, note = {}, ""
    try:
        figures = result.figures()
    except WorkbenchError as error:
        note = str(error)
    display({"text/plain": repr(result), "text/html": card(result, note)}, raw=True)
    for figure in list(figures.values())[:1]:
        display(figure)


def card(result: "Result", note: str = "") -> str:
    """The headline of a result as HTML, every text escaped.

    Args:
        result: What to show.
        note: One more line: why there is no figure.
    """
    from workbench.result import SHORT_KEY

    model = f" on {html.escape(result.model)}" if result.model else ""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='text-align:right'>{number_text(value)}</td></tr>"
        for name, value in result.metrics().items()
    )
    said = f"<div><i>{html.escape(note)}</i></div>" if note else ""
    return (
        f"<div><b>{html.escape(result.probe)}{model}</b> "
        f"<code>{html.escape(result.key[:SHORT_KEY])}</code><table>{rows}</table>"
        f"arrays: {html.escape(', '.join(sorted(result.arrays)))}{said}</div>"
    )
