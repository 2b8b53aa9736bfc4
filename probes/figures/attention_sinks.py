"""Figures of the attention-sinks probe: where heads look, and the angles and lengths behind it."""

import numpy as np
import plotly.graph_objects as go

from probes.attention_sinks_results import AttentionSinkResult, value_drain
from probes.figures.attention_sinks_norms import figure_norms, figure_norms_by_position
from probes.figures.closed_forms import own_query_score, uniform_score
from probes.figures.heatmap import MANY, HeadNumbers, layer_head_heatmap
from probes.figures.lines import (
    head_lines,
    head_points,
    line_style,
    position_axis,
    reference_line,
    shaded,
)
from probes.figures.sink_numbers import (
    drawn_text,
    head_scores,
    mean_elsewhere,
    n_text,
    prompt_lengths,
    ratio_at,
    resid_peak,
    to_numpy,
)
from probes.figures.theme import (
    BAND,
    FAINT,
    INK,
    MARK_PX,
    POINTS,
    SEQUENTIAL,
    SHARES,
    SMALL_PX,
    SQUARE,
    choose_positions,
    head_name,
    log_axis,
    titled,
)

LONG = 256
"""From so many positions on, their axis is logarithmic: sinks are at the beginning."""


def figures(result: AttentionSinkResult) -> dict[str, go.Figure]:
    """All figures of one result; the swap only where it was measured."""
    log_x = result.score.shape[-1] > LONG
    drawn = {
        "sink_heads": figure_sink_heads(result),
        "score_by_position": figure_score_by_position(result, log_x=log_x),
        "norms": figure_norms(result),
        "norms_by_position": figure_norms_by_position(result, log_x=log_x),
        "decomposition": figure_decomposition(result),
    }
    if result.config.inputs == "swap":
        drawn["swap"] = figure_swap(result)
    return drawn


def finding(result: AttentionSinkResult) -> str:
    """What the result says, in one sentence."""
    pos, inputs = result.config.position, result.config.inputs
    score = head_scores(result)
    layer, head = divmod(int(score.argmax()), score.shape[1])
    strongest = f"the strongest head, {head_name(layer, head)},"
    said = [
        f"{result.sink_rate():.1%} of (prompt, layer, head) triples sink at position {pos} "
        f"(score above {result.config.bound:g})",
        f"{strongest} gives it {score.max():.0%} of its attention on average",
        f"|v W_O| there is {value_drain(result.ov_norm, pos):.2f} times its mean elsewhere",
        f"the residual norm at most {resid_peak(result):.3g} times",
    ]
    if inputs == "swap":
        said.insert(1, f"{result.sink_rate(0):.1%} do at position 0, its partner in the swap")
    return f"{'; '.join(said)} ({inputs} inputs, {n_text(result)})."


def figure_sink_heads(result: AttentionSinkResult) -> go.Figure:
    """Which heads sink: layer x head, the mean score at the judged position."""
    pos, bound = result.config.position, result.config.bound
    score = head_scores(result)
    figure = layer_head_heatmap(
        HeadNumbers("mean score (share)", score),
        (
            HeadNumbers(
                "sink rate (share of prompts)", to_numpy(result.is_sink().float().mean(0)), ".1%"
            ),
            HeadNumbers("value drain |v W_O| (ratio to elsewhere)", ratio_at(result.ov_norm, pos)),
            HeadNumbers("cos(q, k)", to_numpy(result.qk_cosine[..., pos])),
            HeadNumbers("|q||k| (ratio to elsewhere)", ratio_at(result.qk_norm_product, pos)),
        ),
        # A model without sinks must not look as if it had some: the scale reaches the threshold.
        scale=(0.0, max(bound, float(np.nanmax(score)))),
    )
    _mark_steady_heads(figure, result.sink_heads())
    return titled(
        figure,
        f"Heads that send their attention to position {pos}",
        f"score: mean attention that key {pos} gets from the queries at or after it, mean over "
        f"prompts; a sink is a score above {bound:g} on one prompt",
        n_text(result),
    )


def figure_score_by_position(result: AttentionSinkResult, *, log_x: bool = False) -> go.Figure:
    """Attention received by key position: the strongest heads as lines, the rest as a band.

    Args:
        result: What the probe found.
        log_x: Spread the beginning; the axis is then position + 1.
    """
    position, bound = result.config.position, result.config.bound
    lengths = prompt_lengths(result)
    shown = choose_positions(int(lengths.max()), [position])
    mean = to_numpy(result.score.nanmean(dim=0))[..., shown]
    x = (shown + int(log_x)).astype(np.float32)
    own = own_query_score(lengths)[shown] > bound
    figure = go.Figure([*shaded(x, own, "own query alone passes the threshold", SHARES[1])])
    figure.add_traces([*head_lines(x, shown, mean, head_scores(result))])
    uniform = uniform_score(lengths)[shown].astype(np.float32)
    figure.add_scatter(
        x=x, y=uniform, mode="lines", name="uniform attention", line=line_style(INK, "dot")
    )
    figure.add_scatter(
        x=x[[0, -1]],
        y=[bound, bound],
        mode="lines",
        name=f"threshold {bound:g}",
        line=reference_line("dash"),
    )
    position_axis(figure, x, log_x=log_x)
    figure.update_yaxes(title="mean score (share of attention)", range=SHARES)
    return titled(
        figure,
        "Attention received by each key",
        "score: mean attention that a key gets from the queries at or after it, mean over prompts; "
        "near a prompt's end a key's own query is most of them, so a high score there is no sink",
        n_text(result) + drawn_text(shown, result),
    )


def figure_decomposition(result: AttentionSinkResult) -> go.Figure:
    """Angle against length of q.k: which of the two makes the sinks."""
    pos = result.config.position
    score = head_scores(result)
    number = HeadNumbers("mean score at this position", score)
    product, cosine = result.qk_norm_product, result.qk_cosine
    elsewhere = head_points(mean_elsewhere(product, pos), mean_elsewhere(cosine, pos), number)
    elsewhere.update(name="mean elsewhere", marker={"color": BAND, "size": SMALL_PX})
    judged = head_points(to_numpy(product[..., pos]), to_numpy(cosine[..., pos]), number)
    judged.update(
        name=f"position {pos}",
        marker={
            "color": score.flatten(),
            "cmin": 0.0,
            "cmax": max(result.config.bound, float(np.nanmax(score))),
            "colorscale": SEQUENTIAL,
            "colorbar": {"title": {"text": "mean score (share)"}},
            "size": MARK_PX if score.size <= MANY else SMALL_PX,
            "line": _outline(INK),
        },
    )
    figure = go.Figure([elsewhere, judged])
    widths = np.stack([to_numpy(product[..., pos]), mean_elsewhere(product, pos)])
    figure.update_xaxes(log_axis(widths), title="|q| |k| (model units)")
    figure.update_yaxes(title="cos(q, k) (from -1 to 1)", zeroline=True, zerolinecolor=FAINT)
    return titled(
        figure,
        "Angle or length: what makes a key attractive",
        "q.k = |q| |k| cos(q, k), one point per head; both factors are means over prompts and over "
        "the queries at or after the key; angle lifts a point, length "
        "moves it right",
        n_text(result),
    )


def figure_swap(result: AttentionSinkResult) -> go.Figure:
    """Which position the sink follows when two position embeddings are exchanged."""
    pos, bound = result.config.position, result.config.bound
    mean = result.score.nanmean(dim=0)
    at_zero, at_pos = to_numpy(mean[..., 0]), to_numpy(mean[..., pos])
    points = head_points(
        at_zero,
        at_pos,
        HeadNumbers("sink rate", to_numpy(result.is_sink().float().mean(dim=0)), ".1%"),
    )
    points.update(name="head", marker={"size": MARK_PX, "line": _outline(INK)})
    figure = go.Figure(points)
    figure.add_scatter(
        x=POINTS,
        y=POINTS,
        mode="lines",
        name="equal",
        line=reference_line("dot"),
        hoverinfo="skip",
    )
    limit = {"mode": "lines", "line": reference_line("dash"), "hoverinfo": "skip"}
    figure.add_scatter(
        x=[0, bound, bound], y=[bound, bound, 0], name=f"threshold {bound:g}", **limit
    )
    figure.update_xaxes(title="mean score at position 0 (share of attention)", range=POINTS)
    figure.update_yaxes(title=f"mean score at {pos} (share of attention)", range=POINTS)
    return titled(
        figure.update_layout(height=SQUARE),
        f"The sink after positions 0 and {pos} were swapped",
        f"one token repeated, the position embeddings of 0 and {pos} exchanged; above the diagonal "
        "the sink follows the embedding",
        n_text(result),
    )


# Parts of figures


def _mark_steady_heads(figure: go.Figure, heads: list[tuple[int, int]]) -> None:
    if heads:
        layers, columns = zip(*heads, strict=True)
        marker = {"size": SMALL_PX, "color": "white", "line": _outline("black")}
        figure.add_scatter(
            x=columns,
            y=layers,
            mode="markers",
            marker=marker,
            name="sinks on every prompt",
            hoverinfo="skip",
            showlegend=True,
        )


def _outline(color: str) -> dict[str, object]:
    return {"color": color, "width": 1}
