"""Pictures of what the benchmarks measured: ratios with their spread, and growth with size.

Each picture carries the digest of the numbers it was drawn from, so that a test can tell an old one.
"""

import hashlib
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from record import RESULTS, Row, read_record
from render import IMAGES, PLACE, SECTIONS, grouped, picture

from probes.figures.theme import FAINT, INK, SERIES, log_axis, titled

WIDTH, HEIGHT = 860, 460


def digest(name: str) -> str:
    """Of the numbers behind a picture."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()


def draw_all() -> None:
    """Draw every picture that a section asks for."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in asked_for():
        record = read_record(RESULTS / f"{name}.json")
        drawn = growth(record) if any(row.points for row in record["rows"]) else bars(record)
        svg = drawn.to_image("svg", width=WIDTH, height=drawn.layout.height or HEIGHT).decode()
        # The ids that plotly draws by lot would make every drawing another file.
        for index, found in enumerate(
            dict.fromkeys(re.findall(r"\b(?:defs|clip|topdefs)-?([0-9a-f]{6})", svg))
        ):
            svg = svg.replace(found, f"{index:06d}")
        (IMAGES / picture(name)).write_text(f"{svg}\n<!-- {digest(name)} -->\n", encoding="utf-8")


def asked_for() -> list[str]:
    """Names of the pictures that the page shows."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SECTIONS.glob("*.md"))]
    return [name for text in texts for kind, name in PLACE.findall(text) if kind == "figure"]


def bars(record: dict[str, Any]) -> go.Figure:
    """The ratio of every row, those of one piece of work together; ours stand out."""
    rows: list[Row] = [row for row in grouped(record["rows"]) if row.ratio is not None]
    figure = go.Figure()
    for name, own, color in (("workbench", True, SERIES[0]), ("others", False, FAINT)):
        shown = [row for row in rows if row.is_ours == own]
        middle = [row.ratio or 0.0 for row in shown]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[f"{row.name}: {row.peer}" for row in shown],
            x=middle,
            marker_color=color,
            error_x={
                "array": [(row.ratio_most or row.ratio or 0) - (row.ratio or 0) for row in shown],
                "arrayminus": [
                    (row.ratio or 0) - (row.ratio_least or row.ratio or 0) for row in shown
                ],
                "thickness": 1,
                "color": INK,
            },
        )
    order = [f"{row.name}: {row.peer}" for row in rows]
    figure.add_vline(x=1, line_dash="dot", line_width=1, line_color=INK)
    figure.update_xaxes(title_text="ratio (times)")
    figure.update_layout(barmode="overlay", height=170 + 22 * len(rows))
    about = f"{record['better']} is better; {record['machine']}, {record['date']}"
    titled(figure, record["benchmark"], record["ratio_means"], about)
    figure.update_layout(title={"xref": "container", "pad": {"l": 12, "t": 14}})
    return figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])


def growth(record: dict[str, Any]) -> go.Figure:
    """Time and memory over the length of the prompt; the legend has the exponents of time."""
    rows: list[Row] = [row for row in record["rows"] if row.name.startswith("n_pos")]
    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    peers = list(dict.fromkeys(row.peer for row in rows))
    for row in rows:
        x, y = zip(*row.points, strict=True)
        is_memory = "memory" in row.name
        figure.add_scatter(
            x=x,
            y=y,
            name=f"{row.peer}: time grows as length^{row.median:.2f}",
            legendgroup=row.peer,
            showlegend=not is_memory,
            mode="lines+markers",
            line={
                "color": SERIES[peers.index(row.peer)],
                "dash": "solid" if row.is_ours else "dash",
            },
            row=1,
            col=2 if is_memory else 1,
        )
    for col, title in ((1, "CPU seconds"), (2, "peak memory (MB)")):
        shown = [row for row in rows if ("memory" in row.name) == (col == 2)]
        x, y = (
            np.array(axis) for axis in zip(*(p for row in shown for p in row.points), strict=True)
        )
        figure.update_xaxes(title_text="prompt (tokens)", **log_axis(x), row=1, col=col)
        figure.update_yaxes(title_text=title, **log_axis(y), row=1, col=col)
    about = f"{record['machine']}, {record['date']}"
    return titled(
        figure, "How reading grows", "small GPT-2, one thread, exponents by least squares", about
    )
