"""Curves over revisions of one model, or checkpoints of a run: how sinks come about."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.active_dormant import ActiveDormantResult
from probes.figures.lines import line_style
from probes.figures.theme import (
    BELOW,
    BESIDE,
    DASHES,
    INK,
    SERIES,
    TALL,
    head_name,
    log_axis,
    plain,
    titled,
)
from workbench.errors import ConfigError

SHOWN = 3
"""Heads that get a line of their own: those that sink most at the end."""


def figure_emergence(
    results: Sequence[ActiveDormantResult], names: Sequence[str] | None = None
) -> go.Figure:
    """Sink-logit gap, value norm, residual norm and classes of heads over revisions.

    Args:
        results: One a revision, in order, of one model and the same domains.
        names: Of the revisions. Where each has a number in it (``step512``), that is the axis,
            otherwise they stand side by side; None: counted from 0.

    Raises:
        ConfigError: Fewer than two, or of models of different sizes.
    """
    results = [getattr(result, "measured", result) for result in results]
    names = [str(index) for index in range(len(results))] if names is None else list(names)
    _check(results, names)
    x, axis = revision_axis(names)
    figure = make_subplots(
        2,
        2,
        subplot_titles=["sink-logit gap", "value norm", "residual norm", "heads by class"],
        vertical_spacing=BELOW,
        horizontal_spacing=BESIDE,
    )
    _draw_heads(figure, x, results)
    _draw_residual(figure, x, results)
    for rank, (name, dash) in enumerate(zip(results[0].classes(), DASHES, strict=False)):
        counts = [int(result.classes()[name].sum()) for result in results]
        _line(figure, x, counts, name, line_style(SERIES[rank], dash), (2, 2))
    figure.update_xaxes(axis)
    figure.update_yaxes(title="gap (nats)", row=1, col=1)
    figure.update_yaxes(title="first token over the others (ratio)", row=1, col=2)
    figure.update_yaxes(title="heads (number)", rangemode="tozero", row=2, col=2)
    prompts = int(results[0].n_prompts.sum())
    return titled(
        figure.update_layout(height=TALL),
        "How sinks come about",
        "means over domains; gap: score of the first key minus the mean score of the others; value: "
        "|v W_O|; residual: after the block where the last revision's peak stands out most",
        f"n = {prompts} prompts at each of {len(names)} revisions",
    )


def revision_axis(names: Sequence[str]) -> tuple[list[float] | list[str], dict[str, object]]:
    """Where the revisions stand, and the axis: the numbers in their names on a log scale, plus 1."""
    numbers = [re.search(r"\d+", name) for name in names]
    steps = [float(found[0]) for found in numbers if found]
    ascending = all(a < b for a, b in pairwise(steps))
    if len(steps) < len(names) or not ascending:
        return [plain(name) for name in names], {"title": "revision (name)", "type": "category"}
    x = [step + 1 for step in steps]
    return x, log_axis(np.array(x)) | {"title": "step + 1 (updates)"}


def _check(results: Sequence[ActiveDormantResult], names: Sequence[str]) -> None:
    if len(results) < 2 or len(names) != len(results):
        raise ConfigError(
            f"emergence needs two or more results and a name each; got {len(results)} results and "
            f"{len(names)} names; run the probe with --revision A,B,C"
        )
    shapes = {tuple(result.dormant.shape) for result in results}
    if len(shapes) > 1:
        raise ConfigError(
            "emergence compares revisions of one model on the same domains; got arrays [domain layer "
            f"head] of {', '.join(str(list(shape)) for shape in sorted(shapes))}; draw them apart"
        )


def _draw_heads(
    figure: go.Figure,
    x: list[float] | list[str],
    results: Sequence[ActiveDormantResult],
) -> None:
    last = np.asarray(results[-1].sink_attention.mean(dim=0))
    order = np.argsort(-last, axis=None, kind="stable")[:SHOWN]
    for column, name in enumerate(("sink_logit_gap", "value_norm_ratio"), start=1):
        values = np.stack([np.asarray(getattr(result, name).mean(dim=0)) for result in results])
        mean = values.reshape(len(results), -1).mean(axis=1)
        _line(figure, x, mean, "mean of all heads", line_style(INK), (1, column))
        for rank, index in enumerate(order):
            layer, head = divmod(int(index), last.shape[1])
            style = line_style(SERIES[3 + rank], DASHES[1 + rank])
            _line(figure, x, values[:, layer, head], head_name(layer, head), style, (1, column))


def _draw_residual(
    figure: go.Figure,
    x: list[float] | list[str],
    results: Sequence[ActiveDormantResult],
) -> None:
    final = results[-1]
    depth = int((final.resid_norm_bos / final.resid_norm_rest).mean(dim=0).argmax())
    lines = {"first token": "resid_norm_bos", "mean elsewhere": "resid_norm_rest"}
    heights = []
    for rank, (name, array) in enumerate(lines.items()):
        values = [float(getattr(result, array)[:, depth].mean()) for result in results]
        heights.append(values)
        label = f"{name}, {depth} blocks passed"
        _line(figure, x, values, label, line_style(SERIES[rank], DASHES[rank]), (2, 1))
    figure.update_yaxes(log_axis(np.array(heights)), title="L2 norm (model units)", row=2, col=1)


def _line(
    figure: go.Figure,
    x: list[float] | list[str],
    y: object,
    name: str,
    line: dict[str, object],
    place: tuple[int, int],
) -> None:
    figure.add_scatter(
        x=x,
        y=np.asarray(y),
        name=name,
        mode="lines+markers",
        line=line,
        legendgroup=name,
        showlegend=place != (1, 2),
        row=place[0],
        col=place[1],
        hovertemplate=f"{name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
    )
