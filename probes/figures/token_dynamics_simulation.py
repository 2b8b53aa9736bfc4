"""Trajectories of the state-space simulator, with the closed forms over them."""

import numpy as np
import plotly.graph_objects as go

from probes.figures.lines import line_style, reference_line
from probes.figures.theme import DASHES, SERIES, titled
from probes.state_space_dynamics import Trajectory


def figure_trajectory(
    trajectory: Trajectory, index: int = 0, limits: dict[str, np.ndarray] | None = None
) -> go.Figure:
    """|x_l| of one system over time, both axes logarithmic.

    Args:
        trajectory: What ``simulate`` returned.
        index: Which system.
        limits: Closed forms by name, one value a recorded time.
    """
    time, norm = np.asarray(trajectory.time), np.asarray(trajectory.x[index].norm(dim=-1))
    figure = go.Figure()
    for token in range(norm.shape[1]):
        figure.add_scatter(
            x=time[1:],
            y=norm[1:, token],
            name=f"token {token + 1}",
            mode="lines",
            line=line_style(SERIES[token % len(SERIES)], DASHES[token % len(DASHES)]),
        )
    for name, values in (limits or {}).items():
        figure.add_scatter(
            x=time[1:], y=values[1:], name=name, mode="lines", line=reference_line("dot")
        )
    figure.update_xaxes(title="time (depth, continuous)", type="log", exponentformat="power")
    figure.update_yaxes(title="|x| (model units)", type="log", exponentformat="power")
    stop = float(trajectory.stop_time[index])
    ended = f"; stopped at t = {stop:.4g}" if np.isfinite(stop) else ""
    return titled(
        figure,
        "Tokens of a selective state-space model in continuous depth",
        "dx_l/dt = sum over j <= l of (x_l^T M x_j) exp(-a sum of Delta) Delta(x_j) x_j; dotted: "
        "closed forms",
        f"n = 1 system of {norm.shape[1]} tokens{ended}",
    )
