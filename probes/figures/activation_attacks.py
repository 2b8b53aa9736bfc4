"""Figures of activation attacks: the success surface, the scaling law, and chi across models."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from probes.activation_attacks_results import ActivationAttackResult
from probes.activation_attacks_scaling import fit, interval
from probes.figures.lines import line_style
from probes.figures.theme import (
    BAND,
    FAINT,
    MARK_PX,
    SEQUENTIAL,
    SERIES,
    SHARES,
    log_axis,
    plain,
    titled,
)

PAPER_CHI = (16.0, 25.0)
"""Over two orders of magnitude of model size, from the paper's abstract."""
TRIED_PX = 15


def figures(result: ActivationAttackResult) -> dict[str, go.Figure]:
    """All figures of one result; the sweep of dimensions only where it was measured."""
    drawn = {
        "success": figure_success(result),
        "scaling": figure_scaling(result),
        "chi": figure_chi({"this model": result}),
    }
    if result.fraction is not None:
        drawn["dimensions"] = figure_dimensions(result)
    return drawn


def finding(result: ActivationAttackResult) -> str:
    """What was found, in one sentence."""
    numbers = result.metrics()
    said = [
        f"{numbers['kappa']:.2g} tokens are forced per attacked position "
        f"({numbers['kappa_low']:.2g} to {numbers['kappa_high']:.2g})"
    ]
    if "chi" in numbers:
        said.append(f"chi = {numbers['chi']:.3g} bits in per bit out (p = {result.config.bits})")
    if "exponent" in numbers:
        said.append(f"t_max grows as a^{numbers['exponent']:.2f}")
    if "kappa_tokens" in numbers:
        said.append(f"replaced tokens force {numbers['kappa_tokens']:.2g} each")
    if numbers["n_censored"]:
        said.append(
            f"{numbers['n_censored']:.0f} of {len(result.n_attacked)} t_max are lower bounds: raise "
            "t_limit"
        )
    return f"{'; '.join(said)} ({_n(result)})."


def figure_success(result: ActivationAttackResult) -> go.Figure:
    """Success by attacked positions and target length; a square is what was tried."""
    success = _numpy(result.success.nanmean(dim=-1))
    a, t = np.nonzero(~np.isnan(success))
    x, y = _numpy(result.n_attacked)[a], _numpy(result.curve_t)[t]
    squares = go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name="tried",
        marker={
            "symbol": "square",
            "size": TRIED_PX,
            "color": success[a, t],
            "cmin": 0.0,
            "cmax": 1.0,
            "colorscale": SEQUENTIAL,
            "colorbar": {"title": {"text": f"success ({_unit(result)})"}},
            "line": {"color": FAINT, "width": 1},
        },
        customdata=np.stack([success[a, t], _numpy(result.accuracy.nanmean(-1))[a, t]], axis=-1),
        hovertemplate="a = %{x}, t = %{y}<br>success %{customdata[0]:.2f}"
        "<br>tokens forced %{customdata[1]:.1%}<extra></extra>",
    )
    figure = go.Figure([squares, _limit_line(result)])
    _axes(figure, result, y)
    return titled(
        figure,
        "How many tokens can be forced",
        f"success: {_unit(result)}, on a fresh forward pass; line: t_max, where half succeeds",
        _n(result),
    )


def figure_scaling(result: ActivationAttackResult) -> go.Figure:
    """t_max against a, with the line through the origin and what resampled seeds allow."""
    a = _numpy(result.n_attacked).astype(float)
    kappa = result.fit.kappa
    low, high = interval([each.kappa for each in result.resampled])
    ends = np.array([a.min(), a.max()])
    figure = go.Figure(
        [
            *_band(ends, low, high),
            go.Scatter(
                x=ends,
                y=kappa * ends,
                mode="lines",
                name=f"t = {kappa:.2g} a",
                line=line_style(SERIES[0], "dash"),
            ),
            _points(a, _numpy(result.t_max), "activations", SERIES[0], _numpy(result.censored)),
        ]
    )
    shown = [_numpy(result.t_max), kappa * ends]
    if result.t_max_tokens is not None:
        tokens = _numpy(result.t_max_tokens)
        found = fit(result.n_attacked, result.t_max_tokens).kappa
        name = f"tokens ({found:.2g} a)"
        figure.add_trace(_points(a, tokens, name, SERIES[1], np.zeros(len(a), dtype=bool)))
        shown.append(tokens)
    _axes(figure, result, np.concatenate(shown))
    exponent = result.metrics().get("exponent")
    slope = "" if exponent is None else f"; slope of log t on log a: {exponent:.2f}"
    return titled(
        figure,
        "Forced tokens grow with attacked positions",
        f"t_max: the target length at which half succeeds ({_unit(result)}); kappa = sum(a t) / "
        f"sum(a^2){slope}; t_max = 0 lies below a logarithmic axis",
        _n(result),
    )


def _band(ends: np.ndarray, low: float, high: float) -> list[go.Scatter]:
    """The lines through the origin between two slopes, filled."""
    edge = {"x": ends, "mode": "lines", "line_width": 0, "hoverinfo": "skip"}
    name = f"95 % of resampled seeds: {low:.2g} to {high:.2g}"
    return [
        go.Scatter(y=low * ends, showlegend=False, **edge),
        go.Scatter(y=high * ends, fill="tonexty", fillcolor=BAND, name=name, **edge),
    ]


def figure_chi(results: Mapping[str, ActivationAttackResult]) -> go.Figure:
    """Attack resistance of several models: bits in per bit out, activations and tokens.

    Args:
        results: By the model's name.
    """
    figure = go.Figure()
    figure.add_hrect(
        *PAPER_CHI,
        fillcolor=BAND,
        line_width=0,
        layer="below",
        name="large models in the paper: {:g} to {:g}".format(*PAPER_CHI),
        showlegend=True,
    )
    for kind, color in (("activations", SERIES[0]), ("tokens", SERIES[1])):
        rows = [
            (name, chi)
            for name, result in results.items()
            if (chi := _chi(result, kind)) is not None
        ]
        if not rows:
            continue
        value, low, high = (np.array(column) for column in zip(*(c for _, c in rows), strict=True))
        figure.add_trace(
            go.Scatter(
                x=[plain(name) for name, _ in rows],
                y=value,
                error_y={"array": high - value, "arrayminus": value - low, "color": color},
                mode="markers",
                marker={"size": MARK_PX, "color": color},
                name=kind,
                hovertemplate=f"%{{x}}: %{{y:.3g}} bits per bit ({kind})<extra></extra>",
            )
        )
    figure.update_yaxes(title="chi (bits in per bit out)", rangemode="tozero")
    figure.update_xaxes(title="model (name)", type="category")
    bits = sorted({result.config.bits for result in results.values()})
    return titled(
        figure,
        "Attack resistance",
        f"chi = d_model p / (kappa log2 d_vocab) with p = {', '.join(map(str, bits))} bits a number; of "
        "tokens 1 / kappa; bars: 95 % of resampled seeds",
        "\n".join(f"{plain(name)}: {_n(result)}" for name, result in results.items()),
    )


def figure_dimensions(result: ActivationAttackResult) -> go.Figure:
    """t_max against the controlled share of the dimensions, at the largest a."""
    assert result.fraction is not None
    assert result.t_max_fraction is not None
    x, y = _numpy(result.fraction), _numpy(result.t_max_fraction)
    a = int(result.n_attacked[-1])
    whole = float(result.t_max[-1])
    ends = np.array([0.0, 1.0])
    figure = go.Figure(
        [
            go.Scatter(
                x=ends,
                y=whole * ends,
                mode="lines",
                name="in proportion to all dimensions",
                line=line_style(SERIES[0], "dash"),
            ),
            _points(x, y, "measured", SERIES[0], np.zeros(len(x), dtype=bool)),
        ]
    )
    figure.update_xaxes(title="controlled dimensions (share)", range=SHARES)
    figure.update_yaxes(title="t_max (tokens)", rangemode="tozero")
    return titled(
        figure,
        "Fewer dimensions force fewer tokens",
        f"t_max at a = {a} when only a fixed random share of the dimensions may change; expected "
        "kappa a share",
        _n(result),
    )


def _chi(result: ActivationAttackResult, kind: str) -> tuple[float, float, float] | None:
    """Chi with the ends of its interval (those of kappa, turned over)."""
    if kind == "tokens":
        chi = result.metrics().get("chi_tokens")
        return None if chi is None else (chi, chi, chi)
    kappa = result.fit.kappa
    low, high = interval([each.kappa for each in result.resampled])
    if kappa <= 0:
        return None
    # Where some resampled kappa is 0, chi has no upper end; the bar then ends at the value.
    upper = result.chi(low) if low > 0 else result.chi(kappa)
    return result.chi(kappa), result.chi(max(high, kappa)), upper


def _points(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], name: str, color: str, bound: np.ndarray
) -> go.Scatter:
    symbols = np.where(bound, "triangle-up", "circle")
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker={"size": MARK_PX, "color": color, "symbol": symbols},
        customdata=np.where(bound, "at least ", ""),
        hovertemplate=f"{name}<br>%{{x}}: t_max %{{customdata}}%{{y:.3g}} tokens<extra></extra>",
    )


def _limit_line(result: ActivationAttackResult) -> go.Scatter:
    return go.Scatter(
        x=_numpy(result.n_attacked),
        y=_numpy(result.t_max),
        mode="lines+markers",
        name="t_max",
        line=line_style(SERIES[1]),
        hovertemplate="a = %{x}: t_max %{y:.3g} tokens<extra></extra>",
    )


def _axes(figure: go.Figure, result: ActivationAttackResult, y: np.ndarray) -> None:
    a = _numpy(result.n_attacked)
    figure.update_xaxes(
        title="attacked positions a (tokens)", type="log", tickvals=a, ticktext=a.astype(str)
    )
    figure.update_yaxes(title="target length t (tokens)", **log_axis(y.astype(float)))


def _unit(result: ActivationAttackResult) -> str:
    if result.config.definition == "per-token":
        return "share of target tokens forced"
    return "share of targets forced whole"


def _n(result: ActivationAttackResult) -> str:
    count = int((~result.success.isnan()).sum())
    config = result.config
    return (
        f"n = {result.success.shape[-1]} contexts of {config.context} tokens, {count} attacks, "
        f"{config.positions} positions of layer {config.layer}, at most {config.steps} steps"
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
