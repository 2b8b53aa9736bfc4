"""Figures of the Bigram-Backcopy toy's parts: attention patterns, sink logits by token, ablations."""

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from probes.figures.lines import line_style
from probes.figures.theme import DASHES, SEQUENTIAL, SERIES, head_name, plain, rows_height, titled
from toy_tasks.bigram_backcopy import BigramBackcopyResult

SHOWN_POS = 32
"""Positions of a pattern that are drawn: more are too small to see."""
EVERY = 16
"""Positions from one number on the axis of keys to the next."""
NARROW_GAP, WIDE_GAP = 0.02, 0.06
"""Between panels that share an axis; the wide one has room for a number behind a bar."""
ROOM = 1.25
"""What the axis of a bar is longer than the longest, for the number behind it."""
TINY = 1e-9
ROW_PX = 22
RARE = 1e-3
"""Characters below this share of the text are left out of the figure by token."""


def n_text(result: BigramBackcopyResult) -> str:
    """Over how much the numbers were taken."""
    config = result.config
    return (
        f"n = {len(result.sample_tokens)} held-out sequences of {config.n_pos} tokens, 1 run of "
        f"{int(result.step[-1])} steps (seed {config.seed}, n_layers {config.n_layers}, "
        f"{config.attention} attention, {config.optimizer} lr {config.lr:g})"
    )


def figure_patterns(result: BigramBackcopyResult) -> go.Figure:
    """Attention of the head with the strongest sink, at a few steps, on one sequence."""
    n_heads = result.config.n_heads
    layer, head = divmod(int(result.sink_attention_by_head[-1].argmax()), n_heads)
    shown = result.pattern[:, layer, head, :SHOWN_POS, :SHOWN_POS].numpy()
    figure = make_subplots(
        1,
        len(shown),
        subplot_titles=[f"step {step}" for step in result.pattern_step.tolist()],
        shared_yaxes=True,
        horizontal_spacing=NARROW_GAP,
    )
    n_pos = shown.shape[-1]
    letters = [_letter(result, int(token)) for token in result.sample_tokens[0, :n_pos]]
    for column, pattern in enumerate(shown, start=1):
        heatmap = go.Heatmap(
            z=np.where(np.tri(n_pos, dtype=bool), pattern, np.nan),
            customdata=np.array([[f"{q} attends to {k}" for k in letters] for q in letters]),
            coloraxis="coloraxis",
            hovertemplate="%{customdata}: %{z:.3f}<br>query %{y}, key %{x}<extra></extra>",
        )
        figure.add_trace(heatmap, row=1, col=column)
    triggers = torch.isin(result.sample_tokens[0, :n_pos], result.triggers).nonzero()[:, 0].tolist()
    figure.update_xaxes(title_text="key (position)", dtick=EVERY)
    figure.update_yaxes(range=[n_pos - 0.5, -0.5], tickvals=triggers)
    figure.update_yaxes(title_text="query (position; ticks: triggers)", row=1, col=1)
    bar = {"title": {"text": "attention (share)"}}
    top = 1.0 if result.config.attention == "softmax" else None
    figure.update_layout(
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0.0, "cmax": top, "colorbar": bar},
    )
    return titled(
        figure,
        f"Head {head_name(layer, head)} learns to copy, and to rest",
        "attention on the first positions of one held-out sequence, of the head whose sink is the "
        "strongest in the end: after a trigger it looks one back, elsewhere at the first token",
        n_text(result),
    )


def figure_sink_logits(result: BigramBackcopyResult) -> go.Figure:
    """Sink logit gap by the query's character, at a few steps."""
    order = result.unigram.argsort(descending=True, stable=True)
    at_last = result.sink_logit_gap_by_token[-1]
    order = order[(at_last[order].isfinite() & (result.unigram[order] >= RARE)).numpy()]
    letters = [_letter(result, int(token)) for token in order]
    figure, steps = go.Figure(), result.step.tolist()
    for rank, step in enumerate(result.pattern_step.tolist()):
        values = result.sink_logit_gap_by_token[steps.index(step)][order]
        figure.add_scatter(
            x=letters,
            y=values.tolist(),
            name=f"step {step}",
            mode="lines+markers",
            line=line_style(SERIES[rank], DASHES[rank], 1),
            hovertemplate=f"step {step}, character %{{x}}: %{{y:.2f}} nats<extra></extra>",
        )
    figure.update_xaxes(
        title_text="query (character; the most frequent first)",
        type="category",
        dtick=1,
        tickangle=0,
        tickfont_size=10,
    )
    figure.update_yaxes(title_text="sink logit gap (nats)")
    spread = zip(
        result.sink_logit_spread_by_layer[-1].tolist(),
        result.other_logit_spread_by_layer[-1].tolist(),
        strict=True,
    )
    words = ", ".join(
        f"layer {layer} {ours:.1f} ({others:.1f})" for layer, (ours, others) in enumerate(spread)
    )
    return titled(
        figure,
        "Sink logits by character",
        "score at the first token minus the mean score at other keys, mean over layers and heads; "
        f"characters of at least {RARE:.1%} of the text, no triggers; in the end they spread by "
        f"(in brackets: other scores) {words}",
        n_text(result),
    )


def figure_ablations(result: BigramBackcopyResult) -> go.Figure:
    """Risks and residual peak at the end of training, whole and with a part taken away."""
    names = ["nothing taken away", *result.labels["ablation"]]
    peak = result.resid_norm_bos_by_depth[-1, 1:] / result.resid_norm_rest_by_depth[-1, 1:]
    panels = {
        "backcopy risk (nats)": (result.backcopy_risk[-1], result.backcopy_risk_ablated),
        "bigram risk (nats)": (result.bigram_risk[-1], result.bigram_risk_ablated),
        "residual peak (ratio)": (peak.max(), result.resid_peak_ablated),
    }
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=WIDE_GAP)
    for column, (name, (whole, ablated)) in enumerate(panels.items(), start=1):
        values = [float(whole), *ablated[:, -1].tolist()]
        figure.add_bar(
            x=values,
            y=names,
            orientation="h",
            marker_color=SERIES[column - 1],
            text=[f"{value:.3g}" for value in values],
            textposition="outside",
            cliponaxis=False,
            showlegend=False,
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.4g}}<extra></extra>",
            row=1,
            col=column,
        )
        top = ROOM * max(*values, TINY)
        figure.update_xaxes(title_text=name, range=[0, top], row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title_text="taken away (part)", col=1)
    return titled(
        figure.update_layout(height=rows_height(len(names), ROW_PX)),
        "What each part does",
        "excess risks after triggers and elsewhere; residual norm of the first token over that of the "
        "rest, after the block behind which it is largest; one part taken away at a time",
        n_text(result),
    )


def _letter(result: BigramBackcopyResult, token: int) -> str:
    """A character as it can be read on an axis."""
    letter = result.labels["token"][token]
    return {" ": "␣", "\n": "⏎"}.get(letter, plain(letter))
