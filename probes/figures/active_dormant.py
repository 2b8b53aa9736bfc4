"""Figures of the active-dormant probe: which heads work where, and who makes the residual peak."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.active_dormant import ActiveDormantResult
from probes.figures.active_dormant_emergence import figure_emergence
from probes.figures.active_dormant_heads import figure_head
from probes.figures.heatmap import HeadNumbers, layer_head_heatmap
from probes.figures.lines import line_style, reference_line
from probes.figures.theme import (
    BESIDE,
    DASHES,
    INK,
    MARK_PX,
    NARROW,
    POINTS,
    SERIES,
    SQUARE,
    head_name,
    log_axis,
    plain,
    tick_step,
    titled,
)

MAX_PAIRS = 3
"""Pairs of domains that get a figure of their own."""
SMALLEST, LARGEST = 5.0, 34.0
"""Diameters of a head's marker, in pixels."""
OPACITY = 0.7
"""So that heads on each other are seen."""
TINY = 1e-12
"""The least that the largest loss counts as, in nats."""
_LOOKS = {
    "always active": (SERIES[0], "circle"),
    "active-dormant": (SERIES[1], "diamond"),
    "always dormant": (INK, "square"),
}


def figures(result: ActiveDormantResult) -> dict[str, go.Figure]:
    """All figures of one result: domains in pairs, the residual peak, and a page a kept head."""
    names = result.labels["domain"]
    drawn = {}
    for a, b in list(combinations(range(len(names)), 2))[:MAX_PAIRS]:
        suffix = "" if len(names) == 2 else f"_{names[a]}_{names[b]}"
        drawn[f"domains{suffix}"] = figure_domains(result, a, b)
        drawn[f"difference{suffix}"] = figure_difference(result, a, b)
    drawn["residual_peak"] = figure_residual_peak(result)
    for layer, head in result.example_head.tolist():
        drawn[f"head_{head_name(layer, head)}"] = figure_head(result, layer, head)
    return drawn


def figures_over_revisions(
    results: Sequence[ActiveDormantResult], names: Sequence[str]
) -> dict[str, go.Figure]:
    """What several revisions of one model show together."""
    return {"emergence": figure_emergence(results, names)}


def finding(result: ActiveDormantResult) -> str:
    """What the result says, in one sentence."""
    found = {name: heads.nonzero().tolist() for name, heads in result.classes().items()}
    total = sum(map(len, found.values()))
    said = ", ".join(f"{len(heads)} {name}" for name, heads in found.items())
    switching = ", ".join(head_name(*head) for head in found["active-dormant"][:4])
    part, layer = result.peak_maker()
    share = result.peak_share()[result.labels["part"].index(part), layer].item()
    return (
        f"of {total} heads {said}{f' ({switching})' if switching else ''}; without the {part} of "
        f"block {layer} {share:.0%} of the first token's residual peak is left ({_n_text(result)})."
    )


def figure_domains(result: ActiveDormantResult, a: int = 0, b: int = 1) -> go.Figure:
    """Heads as points: sink attention in one domain against another, sized by ablation loss.

    Args:
        result: What the probe found.
        a: Index of the domain on the x axis.
        b: Of the one on the y axis.
    """
    names, config = _domains(result), result.config
    missed = _numpy(result.ablation_loss[[a, b]])
    size = marker_sizes(missed.max(axis=0))
    figure = go.Figure()
    for name, heads in result.classes().items():
        chosen = _numpy(heads)
        color, symbol = _LOOKS[name]
        figure.add_scatter(
            x=_numpy(result.sink_attention[a])[chosen],
            y=_numpy(result.sink_attention[b])[chosen],
            mode="markers",
            name=f"{name} ({int(chosen.sum())})",
            marker={
                "size": size[chosen],
                "color": color,
                "symbol": symbol,
                "opacity": OPACITY,
                "line": {"color": "white", "width": 1},
            },
            customdata=_hover_rows(result, a, b)[chosen],
            hovertemplate=_hover(names[a], names[b]),
        )
    _add_bounds(figure, config.sink_threshold)
    figure.update_xaxes(title=f"sink attention in {names[a]} (share)", range=POINTS)
    figure.update_yaxes(title=f"sink attention in {names[b]} (share)", range=POINTS)
    return titled(
        figure.update_layout(height=SQUARE, legend_itemsizing="constant"),
        f"Heads in {names[a]} and in {names[b]}",
        "sink attention: mean attention of queries n >= 2 to the first token; area: loss added by "
        "zeroing the head, in the domain where it is larger; dormant: above the threshold and at most "
        f"{config.loss_threshold:g} nats per token, domains apart only where q <= {config.fdr:g}",
        plain(_n_text(result)),
    )


def _add_bounds(figure: go.Figure, bound: float) -> None:
    """Where both domains are alike, and where a head is called dormant."""
    figure.add_scatter(
        x=POINTS,
        y=POINTS,
        mode="lines",
        name="equal",
        line=reference_line("dot"),
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[bound, bound, None, *POINTS],
        y=[*POINTS, None, bound, bound],
        mode="lines",
        name=f"threshold {bound:g}",
        line=reference_line("dash"),
        hoverinfo="skip",
    )


def marker_sizes(missed: np.ndarray) -> np.ndarray:
    """Diameters whose areas grow with the loss; heads that are not missed get the smallest."""
    largest = max(float(missed.max()), TINY)
    return SMALLEST + (LARGEST - SMALLEST) * np.sqrt(missed.clip(min=0.0) / largest)


def _hover_rows(result: ActiveDormantResult, a: int, b: int) -> np.ndarray:
    layer, head = np.indices(result.dormant.shape[1:])
    pairs = ("ablation_loss", "bos_loss", "value_norm_ratio", "sink_logit_gap")
    rows = [layer, head]
    rows += [_numpy(getattr(result, name)[d]) for name in pairs for d in (a, b)]
    rows += [_numpy(result.q_sink), _numpy(result.q_loss)]
    return np.stack(rows, axis=-1).astype(np.float32)


def _hover(first: str, second: str) -> str:
    names = ("loss when zeroed", "loss when moved to BOS", "value norm ratio", "sink-logit gap")
    lines = ["<b>layer %{customdata[0]}, head %{customdata[1]}</b>"]
    lines.append(f"sink attention: {first} %{{x:.3f}}, {second} %{{y:.3f}}")
    lines += [
        f"{name}: {first} %{{customdata[{2 + 2 * i}]:.3g}}, {second} %{{customdata[{3 + 2 * i}]:.3g}}"
        for i, name in enumerate(names)
    ]
    lines.append("q: sink %{customdata[10]:.2g}, loss %{customdata[11]:.2g}")
    return "<br>".join(lines) + "<extra></extra>"


def figure_difference(result: ActiveDormantResult, a: int = 0, b: int = 1) -> go.Figure:
    """Layer x head: how much more a head sinks in one domain than in another.

    Args:
        result: What the probe found.
        a: Index of the domain that is taken from.
        b: Of the one that is subtracted.
    """
    names = _domains(result)
    sink, loss = _numpy(result.sink_attention), _numpy(result.ablation_loss)
    figure = layer_head_heatmap(
        HeadNumbers(f"sink attention, {names[a]} - {names[b]}", sink[a] - sink[b]),
        (
            HeadNumbers(f"in {names[a]}", sink[a]),
            HeadNumbers(f"in {names[b]}", sink[b]),
            HeadNumbers(f"loss when zeroed in {names[a]} (nats)", loss[a], ".4f"),
            HeadNumbers(f"in {names[b]} (nats)", loss[b], ".4f"),
            HeadNumbers("q of the difference", _numpy(result.q_sink), ".2g"),
        ),
        zero=0.0,
    )
    heads = (result.q_sink <= result.config.fdr).nonzero().tolist()
    if heads:
        layers, columns = zip(*heads, strict=True)
        figure.add_scatter(
            x=columns,
            y=layers,
            mode="markers",
            marker={"symbol": "circle-open", "size": MARK_PX, "color": INK, "line_width": 2},
            name=f"differs (q <= {result.config.fdr:g})",
            showlegend=True,
            hoverinfo="skip",
        )
    return titled(
        figure,
        f"Where heads sink more in {names[a]} than in {names[b]}",
        "difference of mean attention to the first token; permutation test over prompts, "
        "false-discovery rate over heads",
        plain(_n_text(result)),
    )


def figure_residual_peak(result: ActiveDormantResult) -> go.Figure:
    """The first token's residual norm along depth, and what is left of it without each part."""
    figure = make_subplots(
        1, 2, subplot_titles=["residual norm", "peak without one part"], horizontal_spacing=BESIDE
    )
    names = _domains(result)
    depth = np.arange(result.resid_norm_bos.shape[1])
    lines = {"first token": result.resid_norm_bos, "mean elsewhere": result.resid_norm_rest}
    for (name, norms), dash in zip(lines.items(), DASHES, strict=False):
        for d, domain in enumerate(names):
            figure.add_scatter(
                x=depth,
                y=_numpy(norms[d]),
                mode="lines+markers",
                name=f"{name}, {domain}",
                line=line_style(SERIES[d % len(SERIES)], dash),
                row=1,
                col=1,
            )
    share = _numpy(result.peak_share())
    layers = np.arange(share.shape[1])
    for p, part in enumerate(result.labels["part"]):
        if not np.isnan(share[p]).any():
            color = SERIES[2 + p]
            figure.add_bar(x=layers, y=share[p], name=part, marker_color=color, row=1, col=2)
    heights = np.stack([_numpy(norms) for norms in lines.values()])
    figure.update_xaxes(title="blocks passed (number)", dtick=tick_step(len(depth), NARROW), col=1)
    figure.update_yaxes(log_axis(heights), title="L2 norm (model units)", col=1)
    figure.update_xaxes(title="block (index)", dtick=tick_step(len(layers), NARROW), col=2)
    figure.update_yaxes(title="peak that is left (share)", rangemode="tozero", col=2)
    figure.add_hline(y=1.0, line=reference_line("dot"), row=1, col=2)
    return titled(
        figure,
        "Who makes the residual peak of the first token",
        "norms are means over prompts; right: largest norm over depth at position 0 with one block's "
        "attention or MLP zeroed, over the intact one, mean over domains",
        plain(_n_text(result)),
    )


def _domains(result: ActiveDormantResult) -> list[str]:
    return [plain(name) for name in result.labels["domain"]]


def _n_text(result: ActiveDormantResult) -> str:
    pairs = zip(result.labels["domain"], result.n_prompts.tolist(), strict=True)
    return "n = " + ", ".join(f"{n} prompts of {name}" for name, n in pairs)


def _numpy(tensor: object) -> np.ndarray:
    return np.asarray(tensor)
