"""Figures of the reachability probe: k-epsilon curve, found prompts, ranks, bound against found."""

import numpy as np
import plotly.graph_objects as go

from probes.figures.lines import line_style
from probes.figures.theme import (
    BAND,
    FAINT,
    INK,
    SERIES,
    SHARES,
    log_axis,
    rows_height,
    tick_step,
    titled,
    wrapped,
)
from probes.reachability_results import ReachabilityResult

MOST_ROWS = 40
"""Pairs in the table of prompts; the shortest controls first."""
ROW_PX, CELL_PX, HEAD_PX, EDGE_PX = 34, 30, 44, 14
WIDTHS = (2, 8, 11, 4, 4, 4, 3)
"""Of the columns, in parts."""
SHAKEN, OPACITY = 0.22, 0.7
"""So that points on each other are seen: how far they are moved at most, how dense they are."""
N_SYMBOLS = 8
"""Shapes of marks, the first of plotly's."""
_SPACE = "\u2423"
"""Stands for a space at an end, where it could not be seen."""


def figures(result: ReachabilityResult) -> dict[str, go.Figure]:
    """All figures of one result; the bound only where a control was found and heads were read."""
    drawn = {
        "k_epsilon": figure_k_epsilon(result),
        "prompts": figure_prompts(result),
        "length_by_rank": figure_length_by_rank(result),
    }
    if result.head_limit is not None and bool((result.k > 0).any()):
        drawn["bound"] = figure_bound(result)
    return drawn


def finding(result: ReachabilityResult) -> str:
    """What the result says, in one sentence."""
    said, config = result.metrics(), result.config
    parts = [
        f"{said['reached']:.1%} of the targets ({config.targets}) are reached by at most "
        f"{config.k_max} tokens in front of the state",
        f"{said['reached_base']:.1%} without any",
    ]
    if "mean_k" in said:
        parts.append(f"mean length {said['mean_k']:.2g} tokens over those reached")
    if said["excluded_by_bound"]:
        parts.append(f"{said['excluded_by_bound']:.1%} are proved to be out of reach")
    return f"{'; '.join(parts)} (search: {config.method}; {n_text(result)})."


def n_text(result: ReachabilityResult) -> str:
    """Over how much the numbers were taken."""
    n_pairs, n_states = len(result.k), len(result.state_index.unique())
    return f"n = {n_pairs} pairs of state and target, {n_states} different states"


def figure_k_epsilon(result: ReachabilityResult) -> go.Figure:
    """The share of targets out of reach, by the longest control allowed."""
    x = np.arange(len(result.epsilon))
    low, high, middle = (
        part.numpy() for part in (result.epsilon_low, result.epsilon_high, result.epsilon)
    )
    step = {"shape": "hv", "width": 0}
    hidden = {"mode": "lines", "line": step, "hoverinfo": "skip"}
    figure = go.Figure()
    figure.add_scatter(x=x, y=low, showlegend=False, **hidden)
    name = "95 % interval, states resampled"
    figure.add_scatter(x=x, y=high, fill="tonexty", fillcolor=BAND, name=name, **hidden)
    figure.add_scatter(
        x=x,
        y=middle,
        mode="lines+markers",
        name="found by the search",
        line=line_style(SERIES[0]) | {"shape": "hv"},
        hovertemplate="at most %{x} tokens<br>%{y:.1%} not reached<extra></extra>",
    )
    proved = result.bound_excluded.float().mean().item()
    if proved:
        figure.add_hline(y=proved, line=line_style(INK, "dash"), annotation_text="proved")
    figure.update_xaxes(title="k, longest control allowed (tokens)", dtick=tick_step(len(x)))
    figure.update_yaxes(title="epsilon (share of pairs not reached)", range=SHARES)
    return titled(
        figure,
        f"k-epsilon: {result.metrics()['reached']:.0%} reached within {result.config.k_max} tokens",
        f"epsilon(k): share of pairs whose target no control of at most k tokens was found for; a search "
        f"can miss controls, so this is an upper bound; lengths tried: "
        f"{', '.join(str(k) for k, _ in result.config.stages())}; targets: {result.config.targets}",
        n_text(result),
    )


def figure_prompts(result: ReachabilityResult) -> go.Figure:
    """The controls that were found, as a table, with what they are put before."""
    order = sorted(
        result.reached().nonzero().flatten().tolist(),
        key=lambda i: (int(result.k[i]), int(result.base_rank[i])),
    )
    shown = order[:MOST_ROWS]
    text = {
        name: result.labels.get(f"{name}_text", ("",) * len(result.k))
        for name in ("prompt", "state", "target")
    }
    columns = {
        "k": [str(int(result.k[i])) for i in shown],
        "control": [_visible(text["prompt"][i]) for i in shown],
        "state": [_shortened(text["state"][i]) for i in shown],
        "target": [_visible(text["target"][i]) for i in shown],
        "rank without": [str(int(result.base_rank[i])) for i in shown],
        "P without": [f"{np.exp(-float(result.base_loss[i])):.2g}" for i in shown],
        "P with": [f"{np.exp(-float(result.best_loss[i])):.2g}" for i in shown],
    }
    figure = go.Figure(
        go.Table(
            header={
                "values": wrapped(list(columns)),
                "align": "left",
                "fill_color": FAINT,
                "height": HEAD_PX,
            },
            cells={
                "values": list(columns.values()),
                "align": "left",
                "fill_color": "rgba(0,0,0,0)",
                "height": CELL_PX,
            },
            columnwidth=WIDTHS,
        )
    )
    left_out = (
        f", {len(shown)} of {len(order)} reached pairs shown" if len(order) > len(shown) else ""
    )
    return titled(
        figure.update_layout(
            height=rows_height(len(shown), ROW_PX), margin={"l": EDGE_PX, "r": EDGE_PX}
        ),
        "Prompts that were found",
        f"input = BOS + control + state, and the model's most likely next token is the target; {_SPACE} "
        "is a space at an end; rank 0: the target came first already",
        n_text(result) + left_out,
    )


def figure_length_by_rank(result: ReachabilityResult) -> go.Figure:
    """How long a control must be, by how unlikely the target was."""
    reached = result.reached().numpy()
    beyond = result.config.k_max + 1
    k = np.where(reached, result.k.numpy(), beyond)
    rank = (result.base_rank.numpy() + 1).astype(np.float64)
    spread = np.random.default_rng(0).uniform(-SHAKEN, SHAKEN, len(k))
    figure = go.Figure()
    for name, kept, color, symbol in (
        ("reached", reached, SERIES[0], "circle"),
        ("not reached", ~reached, SERIES[1], "x"),
    ):
        figure.add_scatter(
            x=rank[kept],
            y=(k + spread)[kept],
            mode="markers",
            name=name,
            marker={"color": color, "symbol": symbol, "opacity": OPACITY},
            customdata=k[kept],
            hovertemplate="rank + 1 = %{x}<br>k = %{customdata}<extra></extra>",
        )
    ticks = list(range(0, beyond, tick_step(beyond)))
    figure.update_xaxes(log_axis(rank), title="rank without a control, + 1 (token rank)")
    figure.update_yaxes(
        title="length of the control (tokens)",
        tickvals=[*ticks, beyond],
        ticktext=[*map(str, ticks), "none"],
    )
    return titled(
        figure,
        "Length of the control by the target's rank",
        "one point a pair, shaken vertically so that points do not cover each other; rank 0 is the "
        "model's own choice",
        n_text(result),
    )


def figure_bound(result: ReachabilityResult) -> go.Figure:
    """What the found controls did to each head of layer 0, against what they could do at most."""
    assert result.head_limit is not None
    assert result.head_orthogonal is not None
    kept = result.k > 0
    x, y = result.head_limit[kept].numpy(), result.head_orthogonal[kept].numpy()
    figure = go.Figure()
    for head in range(x.shape[1]):
        figure.add_scatter(
            x=x[:, head],
            y=y[:, head],
            mode="markers",
            name=f"L0H{head}",
            marker={"color": SERIES[head % len(SERIES)], "symbol": head % N_SYMBOLS},
            hovertemplate=f"L0H{head}<br>at most %{{x:.3g}}<br>found %{{y:.3g}}<extra></extra>",
        )
    top = float(max(x.max(), y.max())) * 1.05
    figure.add_scatter(
        x=[0, top], y=[0, top], mode="lines", name="the bound", line=line_style(INK, "dash")
    )
    figure.update_xaxes(title="B(k), the most a control of that length can do (model units)")
    figure.update_yaxes(title="|y_perp| found (model units)")
    said = result.metrics()
    return titled(
        figure,
        "Bound against found, heads of layer 0",
        "y_perp: part of a head's output at the last position, orthogonal to its output without the "
        "control; no point can lie above the dashed line; heads that cannot write the target's own "
        f"value within k_max tokens: {said['heads_excluded']:.1%} of (pair, head)",
        n_text(result),
    )


def _visible(text: str) -> str:
    """Spaces at the ends, and breaks, made visible; markup of the table switched off."""
    core = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    end = len(text) - len(core) - lead
    shown = _SPACE * lead + core + _SPACE * max(end, 0)
    for raw, seen in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\n", "\\n"), ("\t", "\\t")):
        shown = shown.replace(raw, seen)
    return shown


def _shortened(text: str, most: int = 44) -> str:
    """The end of a state, which is next to the target."""
    return _visible(text if len(text) <= most else "\u2026" + text[-most:])
