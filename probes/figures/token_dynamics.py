"""Figures of the token-dynamics probe: the walk of a transformer, the spectrum of a Mamba."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from probes.figures.lines import line_style
from probes.figures.theme import (
    BESIDE,
    DASHES,
    FAINT,
    INK,
    NARROW,
    SERIES,
    SHARES,
    tick_step,
    titled,
)
from probes.figures.token_dynamics_sources import figure_decoding, figure_sources
from probes.figures.token_dynamics_spectrum import figure_eigenvalues, figure_signs
from probes.token_dynamics_results import (
    REGIMES,
    VIEWS,
    StateSpaceResult,
    TokenDynamicsResult,
    WalkResult,
)

KINDS = ("attention (aggregate)", "MLP (filter)")


def figures(result: TokenDynamicsResult) -> dict[str, go.Figure]:
    """All figures of one result, by its mode."""
    if isinstance(result, StateSpaceResult):
        return {"eigenvalues": figure_eigenvalues(result), "signs": figure_signs(result)}
    assert isinstance(result, WalkResult)
    drawn = {
        "steps": figure_steps(result),
        "arrival": figure_arrival(result),
        "angles": figure_angles(result),
        "association": figure_association(result),
        "sources": figure_sources(result),
    }
    if result.proximity is not None:
        drawn["decoding"] = figure_decoding(result)
    return drawn


def finding(result: TokenDynamicsResult) -> str:
    """What the result says, in one sentence."""
    said = result.metrics()
    if isinstance(result, StateSpaceResult):
        counts = [f"{name}: {result.share(code - 1):.0%}" for code, name in enumerate(REGIMES)]
        return (
            f"Layers by regime: {', '.join(counts)}; {said['positive_eigenvalues']:.0%} of the "
            f"eigenvalues of S_B S_C^T have a positive real part (n = {len(result.regime)} layers)."
        )
    assert isinstance(result, WalkResult)
    return (
        f"The displacement is {said['straightness']:.0%} of the walk's length "
        f"(median); attention walks {said['aggregate_share']:.0%} of it; the final token arrives "
        f"after {said['arrival_share']:.0%} of the steps; uniform attention keeps "
        f"{said['redundancy']:.0%} of what attention does ({n_text(result)})."
    )


def n_text(result: WalkResult) -> str:
    """Over how much the numbers were taken."""
    n_prompts, n_tokens = result.step_norm.shape[0], int(result.inside().sum())
    prompts = "1 prompt" if n_prompts == 1 else f"{n_prompts} prompts"
    return f"n = {n_tokens} tokens of {prompts}, the first of each left out"


# The walk


def figure_steps(result: WalkResult) -> go.Figure:
    """How long each step is, next to where the walk stands; attention and MLP apart."""
    inside = result.inside()
    relative = (result.step_norm / result.waypoint_norm[..., :-1])[inside]
    panels = {"step length |s|": result.step_norm[inside], "relative step |s| / |r|": relative}
    figure = make_subplots(1, 2, subplot_titles=list(panels), horizontal_spacing=BESIDE)
    units = ("step length (model units)", "relative step (ratio)")
    for column, values in enumerate(panels.values(), start=1):
        low, middle, high = _quartiles(values)
        figure.update_yaxes(title=units[column - 1], row=1, col=column)
        for kind, name in enumerate(KINDS):
            figure.add_bar(
                x=np.arange(len(middle[kind::2])),
                y=middle[kind::2],
                error_y={
                    "array": (high - middle)[kind::2],
                    "arrayminus": (middle - low)[kind::2],
                    "color": INK,
                },
                name=name,
                marker_color=SERIES[kind],
                legendgroup=name,
                showlegend=column == 1,
                hovertemplate=f"block %{{x}}, {name}<br>median %{{y:.3g}}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title="block (index)", dtick=tick_step(len(middle) // 2, NARROW))
    return titled(
        figure,
        f"Steps of the walk: attention walks {result.metrics()['aggregate_share']:.0%} of it",
        "median over tokens, whiskers from the lower to the upper quartile; residual norms grow with "
        "depth, so the right panel compares blocks",
        n_text(result),
    )


def figure_arrival(result: WalkResult) -> go.Figure:
    """Where the final token arrives: the lens at every waypoint."""
    n_waypoints = result.lens_kl.shape[1]
    x = np.arange(n_waypoints)
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_scatter(
        x=x,
        y=_mean(result.lens_agreement),
        name="final argmax is first (logit lens)",
        line=line_style(SERIES[0]),
        mode="lines+markers",
    )
    arrived = result.arrival[result.inside()]
    figure.add_scatter(
        x=x,
        y=np.asarray([(arrived <= i).float().mean().item() for i in range(n_waypoints)]),
        name="has arrived for good",
        line=line_style(SERIES[2], "dash"),
        mode="lines+markers",
    )
    _add_divergences(figure, x, result)
    figure.update_xaxes(title=_WAYPOINTS, dtick=tick_step(n_waypoints))
    figure.update_yaxes(title="tokens (share)", range=SHARES, secondary_y=False)
    figure.update_yaxes(
        title="KL(final || lens) (nats)",
        rangemode="tozero",
        showgrid=False,
        tickmode="auto",
        secondary_y=True,
    )
    return titled(
        figure,
        "Where the final token arrives",
        "each waypoint read by the model's own final norm and unembedding; arrived: the model's "
        "final argmax is first from there on",
        n_text(result),
    )


def _add_divergences(figure: go.Figure, x: np.ndarray, result: WalkResult) -> None:
    """How far the lenses are from the final distribution, on the axis of nats."""
    figure.add_scatter(
        x=x,
        y=_mean(result.lens_kl),
        name="KL of the logit lens",
        line=line_style(SERIES[1], "dot"),
        mode="lines",
        secondary_y=True,
    )
    if result.tuned_kl is not None:
        figure.add_scatter(
            x=x[:-1:2],
            y=_mean(result.tuned_kl),
            name="KL of the tuned lens",
            line=line_style(SERIES[3], "dashdot"),
            mode="lines+markers",
            secondary_y=True,
        )


_WAYPOINTS = "waypoint (index; 0: embedding, odd: after attention, even: after the MLP)"


def figure_angles(result: WalkResult) -> go.Figure:
    """Angles along the walk: to its end, and between one step and the next."""
    titles = ["cosine with the last waypoint", "turning: cosine of one step with the next"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=BESIDE)
    for rank, view in enumerate(VIEWS):
        look = {
            "name": view,
            "legendgroup": view,
            "mode": "lines+markers",
            "line": line_style(SERIES[rank], DASHES[rank]),
        }
        to_end, turning = _mean(result.view_cosine[rank]), _mean(result.view_turning[rank])
        figure.add_scatter(x=np.arange(len(to_end)), y=to_end, **look, row=1, col=1)
        x = np.arange(1, len(turning) + 1)
        figure.add_scatter(x=x, y=turning, **look, showlegend=False, row=1, col=2)
    pair, null = _mean(result.pair_cosine), _mean(result.turning_null)
    controls = (
        ("two different tokens (anisotropy)", np.arange(len(pair)), pair, 1),
        ("steps in random order (null)", np.arange(1, len(null) + 1), null, 2),
    )
    for name, x, y, column in controls:
        dash = line_style(INK, "dot" if column == 1 else "longdash")
        figure.add_scatter(x=x, y=y, name=name, mode="lines", line=dash, row=1, col=column)
    figure.update_xaxes(title="waypoint (index)", dtick=tick_step(len(pair), NARROW))
    figure.update_yaxes(zeroline=True, zerolinecolor=FAINT)
    figure.update_yaxes(title="mean cosine (from -1 to 1)")
    return titled(
        figure,
        "Angles of the walk",
        "centred: less the prompt's mean over tokens at each waypoint, the control for a direction "
        "that all tokens share; after the final norm: as the unembedding sees it",
        n_text(result),
    )


def figure_association(result: WalkResult) -> go.Figure:
    """How far attention is from its baseline, layer by layer."""
    bias, gap = _mean(result.association_bias), _mean(result.entropy_gap)
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_bar(x=np.arange(len(bias)), y=bias, name="association bias")
    figure.add_scatter(
        x=np.arange(len(gap)),
        y=gap,
        name="entropy gap",
        mode="lines+markers",
        line=line_style(SERIES[1], "dash"),
        secondary_y=True,
    )
    figure.update_xaxes(title="layer (index)", dtick=tick_step(len(bias)))
    figure.update_yaxes(title="|bias| / |attn_out| (ratio)", rangemode="tozero", secondary_y=False)
    figure.update_yaxes(
        title="entropy gap (nats)",
        rangemode="tozero",
        showgrid=False,
        tickmode="auto",
        secondary_y=True,
    )
    return titled(
        figure,
        f"Association bias: the baseline keeps {result.redundancy():.0%} of what attention does",
        f"bias: what attention writes less what {result.config.baseline} attention would write at the "
        "same input; entropy gap: ln(position + 1) - entropy, 0 for uniform attention; kept: 1 - "
        "KL(full || baseline) / KL(full || silenced)",
        n_text(result),
    )


# Parts


def _quartiles(values: Float[Tensor, "token step"]) -> list[Float[np.ndarray, " step"]]:
    return [np.quantile(np.asarray(values), share, axis=0) for share in (0.25, 0.5, 0.75)]


def _mean(values: Float[Tensor, "batch any"]) -> Float[np.ndarray, " any"]:
    return np.asarray(values.nanmean(dim=0))
