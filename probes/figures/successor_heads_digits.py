"""Figures of the last digit: steering, features and the linear probe."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from probes.figures.lines import line_style, reference_line
from probes.figures.theme import (
    DASHES,
    DIVERGING,
    INK,
    POINTS,
    SERIES,
    SHARES,
    SQUARE,
    head_name,
    rows_height,
    titled,
    wrapped,
)
from probes.successor_heads import SuccessorHeadsResult

TWO_COLOURS = ((0.0, "#c9c9c9"), (0.5, "#c9c9c9"), (0.5, SERIES[0]), (1.0, SERIES[0]))
ROW_PX = 9
MOST_ROWS = 110
"""Sources that are drawn; the table has all of them."""


def _numpy(x: Tensor | None) -> np.ndarray:
    assert x is not None  # figures() asks
    array: np.ndarray = x.float().numpy()
    return array


def figure_steering(result: SuccessorHeadsResult) -> go.Figure:
    """Source x digit: whether the head names the successor of the steered item."""
    table, said = _numpy(result.steering_table), _numpy(result.steered_index)
    sources = list(result.labels["source"])
    shown = rows_shown(sources)
    figure = go.Figure(
        go.Heatmap(
            z=table[shown],
            x=[str(digit) for digit in range(table.shape[1])],
            y=[sources[row] for row in shown],
            customdata=said[shown].astype(np.float32),
            zmin=0,
            zmax=1,
            colorscale=TWO_COLOURS,
            showscale=False,
            hovertemplate="%{y} to digit %{x}<br>followed: %{z:.0f}<br>item named: number "
            "%{customdata:.0f} of its series<extra></extra>",
        )
    )
    figure.update_xaxes(title="digit that is put in (index mod 10)", type="category")
    figure.update_yaxes(title="source (series and item)", autorange="reversed", type="category")
    name = head_name(*result.best)
    return titled(
        figure.update_layout(height=rows_height(len(shown), ROW_PX)),
        f"Steering the last digit: what {name} says",
        "blue: the head names the successor of the item with the new digit; grey: another item; empty: "
        "the series has no such item; the column of the own digit is left as it is",
        f"n = {len(sources)} sources, {len(shown)} of them shown; scale {result.config.steering_scale:g}",
    )


def rows_shown(sources: list[str]) -> list[int]:
    """All series but numbers whole; of the numbers those up to 40."""
    kept = [
        row
        for row, source in enumerate(sources)
        if not source.startswith("numbers:") or int(source.split(":")[1]) <= 40
    ]
    return kept[:MOST_ROWS] if len(kept) > MOST_ROWS else kept


def figure_steering_by_scale(result: SuccessorHeadsResult) -> go.Figure:
    """Success of steering by series, under four strengths."""
    share = _numpy(result.steering_by_scale)
    scales = [float(scale) for scale in result.labels["scale"]]
    figure = go.Figure()
    # One colour more would look like another; with a dash less, no look comes twice.
    dashes = DASHES[:-1]
    for index, task in enumerate(result.labels["task"]):
        figure.add_scatter(
            x=scales,
            y=share[:, index],
            name=task,
            mode="lines+markers",
            line=line_style(SERIES[index % len(SERIES)], dashes[index % len(dashes)]),
        )
    figure.update_xaxes(title="strength (times the digit's own)", type="log", tickvals=scales)
    figure.update_yaxes(title="success (share of source x digit)", range=POINTS)
    return titled(
        figure,
        "Steering by strength",
        "share of (source, other digit) for which the head names the successor of the steered item",
        f"n = {len(result.labels['source'])} sources x 9 digits",
    )


def figure_digit_features(result: SuccessorHeadsResult) -> go.Figure:
    """What the best head makes of each digit's feature."""
    logits = _numpy(result.feature_logits)
    digits = [str(digit) for digit in range(len(logits))]
    reach = float(np.abs(logits).max())
    figure = go.Figure(
        go.Heatmap(
            z=logits,
            x=digits,
            y=digits,
            zmin=-reach,
            zmax=reach,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "mean logit (SD of the row)"}},
            hovertemplate="feature of %{y}, number ending in %{x}: %{z:.2f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[digits[(index + 1) % len(digits)] for index in range(len(digits))],
        y=digits,
        mode="markers",
        name="next digit",
        marker={"symbol": "circle-open", "size": 14, "color": INK, "line_width": 2},
        hoverinfo="skip",
        showlegend=True,
    )
    figure.update_xaxes(title="last digit of the number named (digit)", type="category")
    figure.update_yaxes(title="feature of digit (digit)", autorange="reversed", type="category")
    return titled(
        figure.update_layout(height=SQUARE),
        f"What {head_name(*result.best)} makes of each digit's feature",
        "each autoencoder feature goes through the head's OV circuit and the unembedding; mean logit of "
        "numbers by last digit, rows with mean 0 and deviation 1",
        "n = 10 features",
    )


def figure_probe(result: SuccessorHeadsResult) -> go.Figure:
    """A linear probe of the last digit, fitted on numbers, on every series."""
    accuracy: Float[np.ndarray, " task"] = _numpy(result.probe_accuracy_by_task)
    tasks = wrapped(result.labels["task"])
    figure = go.Figure(go.Bar(x=tasks, y=accuracy, name="accuracy"))
    figure.add_scatter(
        x=tasks, y=[0.1] * len(tasks), mode="lines", name="chance", line=reference_line("dash")
    )
    figure.update_xaxes(title="series (name)")
    figure.update_yaxes(title="accuracy (share)", range=SHARES)
    return titled(
        figure,
        "Is the last digit the same direction in every series?",
        "logistic regression on index mod 10, fitted on numbers; on numbers themselves it is judged on "
        "tens that it has not seen",
        f"n = {len(result.labels['source'])} items",
    )
