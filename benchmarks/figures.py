"""Pictures of what the benchmarks measured: ratios with their spread, and growth with size.

Each picture carries the digest of the numbers it was drawn from, so that a test can tell an old one.
"""

import hashlib
import re
from typing import Any

import plotly.graph_objects as go
from record import RESULTS, Row, read_record
from render import IMAGES, PLACE, SECTIONS, picture

from probes.figures.theme import SERIES, log_axis, titled

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
        svg = drawn.to_image("svg", width=WIDTH, height=HEIGHT).decode()
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
    """Ratios of every way of doing each piece of work."""
    rows: list[Row] = [row for row in record["rows"] if row.ratio is not None]
    figure = go.Figure()
    for index, peer in enumerate(dict.fromkeys(row.peer for row in rows)):
        own = [row for row in rows if row.peer == peer]
        figure.add_bar(
            name=peer,
            x=[row.name for row in own],
            y=[row.ratio for row in own],
            marker_color=SERIES[index % len(SERIES)],
            marker_pattern_shape="" if own[0].is_ours else "/",
            error_y={
                "array": [max(0.0, (row.ratio_most or row.ratio) - row.ratio) for row in own],
                "arrayminus": [max(0.0, row.ratio - (row.ratio_least or row.ratio)) for row in own],
                "thickness": 1,
            },
        )
    figure.add_hline(y=1, line_dash="dot", line_width=1)
    figure.update_yaxes(title_text="ratio")
    figure.update_layout(barmode="group")
    about = f"{record['machine']}, {record['date']}"
    return titled(
        figure, record["benchmark"], record["ratio_means"], f"{record['better']} is better; {about}"
    )


def growth(record: dict[str, Any]) -> go.Figure:
    """Time over size for every fitted row; the legend has the exponent."""
    figure = go.Figure()
    rows: list[Row] = [row for row in record["rows"] if row.points]
    for index, row in enumerate(rows):
        x, y = zip(*row.points, strict=True)
        figure.add_scatter(
            x=x,
            y=y,
            name=f"{row.name}, {row.peer}: {row.median:.2f}",
            mode="lines+markers",
            line={"color": SERIES[index % len(SERIES)], "dash": "solid" if row.is_ours else "dash"},
        )
    import numpy as np

    every = [
        np.array(axis)
        for axis in zip(*(point for row in rows for point in row.points), strict=True)
    ]
    figure.update_xaxes(title_text="size (tokens, layers, heads or prompts)", **log_axis(every[0]))
    figure.update_yaxes(title_text="CPU seconds", **log_axis(every[1]))
    about = f"{record['machine']}, {record['date']}"
    return titled(figure, record["benchmark"], "time over size; the number is the slope", about)
