"""Figures of token-dynamics by token: what each source adds, and the decoding path."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int

from probes.figures.lines import line_style
from probes.figures.theme import (
    DIVERGING,
    FAINT,
    SERIES,
    choose_positions,
    tick_step,
    titled,
    token_name,
)
from probes.token_dynamics_results import WalkResult


def figure_sources(result: WalkResult, prompt: int = 0, query: int = 0) -> go.Figure:
    """What each source token adds to attention's output at one query, layer by layer.

    Args:
        result: A walk.
        prompt: Index of the prompt.
        query: Index into ``config.queries``.
    """
    real = int((~result.arrival[prompt].isnan()).sum())
    asked = result.config.queries[query]
    pos = asked if asked >= 0 else real + asked
    shown = choose_positions(pos + 1)
    share = np.asarray(result.attribution_share[prompt, query])[:, shown]
    size = float(np.nanquantile(np.abs(share), 0.99)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            x=shown,
            z=share.astype(np.float32),
            customdata=_hover(result, prompt, query, shown),
            zmin=-size,
            zmax=size,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "share of attn_out"}},
            hovertemplate="layer %{y}, source %{x}%{customdata[1]}<br>share %{z:.3f}"
            "<br>length %{customdata[0]}"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title="source token (position)", dtick=tick_step(pos + 1))
    figure.update_yaxes(title="layer (index)", autorange="reversed", dtick=tick_step(len(share)))
    drawn = "" if len(shown) == pos + 1 else f", {len(shown)} of them drawn"
    return titled(
        figure,
        f"Where attention's output at position {pos} comes from",
        "share of a source token: a . attn_out / |attn_out|^2, a = sum over heads of A[q, k] v_k W_O;"
        " shares and the output bias sum to 1; colours end at the 99th percentile",
        f"n = 1 prompt (index {prompt}), {pos + 1} source tokens{drawn}",
    )


def _hover(
    result: WalkResult, prompt: int, query: int, shown: Int[np.ndarray, " shown"]
) -> list[list[tuple[str, str]]]:
    """Length and token of every cell."""
    n_pos = result.arrival.shape[1]
    names = [token_name(result.labels, prompt, int(pos), n_pos) for pos in shown]
    norm = np.asarray(result.attribution_norm[prompt, query])[:, shown]
    return [[(f"{a:.3g}", name) for a, name in zip(row, names, strict=True)] for row in norm]


def figure_decoding(result: WalkResult) -> go.Figure:
    """Context vectors of generated tokens: how close to the unembedding they lie."""
    assert result.proximity is not None
    assert result.chosen_cosine is not None
    figure = go.Figure()
    lines = (
        ("proximity: corr(cos(c, W_U), log p)", result.proximity),
        ("cos(c, W_U) of the chosen token", result.chosen_cosine),
    )
    for rank, (name, values) in enumerate(lines):
        mean = np.asarray(values.nanmean(dim=0))
        spread = np.nanstd(np.asarray(values), axis=0)
        figure.add_scatter(
            x=np.arange(1, len(mean) + 1),
            y=mean,
            error_y={"array": spread, "color": SERIES[rank]},
            name=name,
            mode="lines+markers",
            line=line_style(SERIES[rank], ("solid", "dash")[rank]),
        )
    figure.update_xaxes(title="generated token (number)", dtick=tick_step(values.shape[1]))
    figure.update_yaxes(title="mean (from -1 to 1)", zeroline=True, zerolinecolor=FAINT)
    made = int((~result.proximity.isnan()).sum())
    return titled(
        figure,
        "The decoding path",
        "c: the residual stream behind the final norm; proximity is a correlation over the "
        "vocabulary; with the dot product it would be 1, so the distance from 1 is what norms do; "
        "whiskers: standard deviation over prompts",
        f"n = {made} generated tokens of {len(values)} prompts",
    )
