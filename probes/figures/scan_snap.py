"""Figures of the scan-snap toy: how attention moves and freezes, with the theory over it."""

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from probes.figures.lines import line_style
from probes.figures.theme import (
    BESIDE,
    DASHES,
    INK,
    SEQUENTIAL,
    SERIES,
    choose_positions,
    log_axis,
    rows_height,
    titled,
)
from toy_tasks.scan_snap import ScanSnapResult
from toy_tasks.scan_snap_theory import (
    FlowSettings,
    distinct_logits,
    dominant_invariant,
    integrate_common_logit,
)

ROW_PX = 14
CURVE = 60
"""Points of a theory's curve."""
HEIGHTS = (400, 760)
"""Of the map of attention, the least and the most."""
DRAWN = (0.08, 0.16, 0.32, 1.0)
"""Of the way, the checkpoints whose logits are drawn."""
TINY = 1e-6
"""The least fall that the theory is fitted to."""
FLOW_STEPS = 4000
"""Of the integration, at least; a run has few and long ones."""


def figures(result: ScanSnapResult) -> dict[str, go.Figure]:
    """All figures of one run; the common tokens' only where there are some."""
    drawn = {
        "scan_and_snap": figure_scan_and_snap(result),
        "attention": figure_attention(result),
        "distinct_tokens": figure_distinct_tokens(result),
    }
    if bool(result.law().is_common.any()) and len(result.step) > 2:
        drawn["common_tokens"] = figure_common_tokens(result)
    return drawn


def finding(result: ScanSnapResult) -> str:
    """What the run says, in one sentence."""
    found = result.metrics()
    snap = int(result.snap_step)
    frozen = f"attention froze at step {snap}" if snap >= 0 else "attention had not frozen"
    return (
        f"attention on common tokens went from {found['first_common_mass']:.0%} to "
        f"{found['common_mass']:.0%}, its entropy among distinct tokens from "
        f"{found['first_entropy']:.3f} to {found['entropy']:.3f} nats; {frozen} "
        f"({run_text(result)})."
    )


def figure_scan_and_snap(result: ScanSnapResult) -> go.Figure:
    """Loss, attention on common tokens and entropy along training; the snap is marked."""
    shown = _shown(result)
    step = result.step.numpy()[shown]
    panels = {
        "loss (nats)": result.loss,
        "on common tokens (share)": result.common_mass(),
        "entropy (nats)": result.entropy,
    }
    headings = [name.split(" (")[0] for name in panels]
    figure = make_subplots(1, 3, subplot_titles=headings, horizontal_spacing=BESIDE)
    for column, (name, values) in enumerate(panels.items(), start=1):
        heights = values.numpy()[shown]
        line = {"mode": "lines", "line": line_style(SERIES[column - 1]), "showlegend": False}
        figure.add_scatter(x=step, y=heights, name=name, row=1, col=column, **line)
        if result.snap_step >= 0:
            figure.add_vline(
                int(result.snap_step), line={"color": INK, "dash": "dot"}, row=1, col=column
            )
        figure.update_yaxes(title=name, row=1, col=column)
        figure.update_xaxes(title="updates (steps)", row=1, col=column)
    loss = result.loss.numpy()[shown]
    figure.update_yaxes(log_axis(loss), row=1, col=1)
    return titled(
        figure,
        "Attention scans for distinct tokens, then snaps",
        "attention in infinitely long sequences, means over classes; dotted: first step from which "
        "five steps change Z by less than 5 % of the largest such change",
        n_text(result),
    )


def figure_attention(result: ScanSnapResult, row: int = 0) -> go.Figure:
    """Attention of one class by contextual token, along training."""
    shown, law = _shown(result), result.law()
    tokens = law.prob[row].nonzero().flatten()
    heatmap = go.Heatmap(
        x=result.step.numpy()[shown],
        y=[_token_name(result, row, int(token)) for token in tokens],
        z=result.attention[:, row, tokens].numpy()[shown].T,
        zmin=0.0,
        colorscale=SEQUENTIAL,
        colorbar={"title": {"text": "attention (share)"}},
        hovertemplate="<b>%{y}</b><br>step %{x}: %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(heatmap)
    figure.update_xaxes(title="updates (steps)")
    figure.update_yaxes(title="contextual token (id)", autorange="reversed")
    return titled(
        figure.update_layout(height=int(np.clip(rows_height(len(tokens), ROW_PX), *HEIGHTS))),
        f"Where the attention of class {row} goes",
        "c[l] = P(l) exp(Z[query, l]) over its sum: attention in infinitely long sequences of the "
        "class; distinct tokens are ordered by how frequent they are",
        n_text(result),
    )


def figure_distinct_tokens(result: ScanSnapResult) -> go.Figure:
    """Logits of distinct tokens by frequency at a few steps, with the theory's curves."""
    law = result.law()
    n_distinct = result.config.n_distinct
    prob = law.prob[law.is_distinct].view(-1, n_distinct).mean(dim=0)
    own = result.class_z()[:, law.is_distinct].view(len(result.step), -1, n_distinct).double()
    z, figure = own.mean(dim=1), go.Figure()
    wide = torch.linspace(0, float(prob.max()), CURVE, dtype=torch.float64)
    for rank, index in enumerate(_chosen_steps(result)):
        name, color = f"step {int(result.step[index])}", SERIES[rank]
        figure.add_scatter(
            x=prob.numpy(), y=z[index].numpy(), name=name, mode="markers", marker={"color": color}
        )
        theory = distinct_logits(dominant_invariant(z[index], prob), wide)
        figure.add_scatter(
            x=wide.numpy(),
            y=theory.numpy(),
            name=f"{name}, theory",
            mode="lines",
            line=line_style(color, DASHES[rank]),
        )
    figure.update_xaxes(title="P(token | class) (share of the class's tokens)")
    figure.update_yaxes(title="attention logit z (nats)")
    return titled(
        figure,
        "Frequent distinct tokens win the attention",
        "points: z of distinct tokens, mean over classes; lines: z = -1/2 ln(1 - kappa P^2), which "
        "gradient flow on long sequences obeys, through the most frequent token (Theorem 3)",
        n_text(result),
    )


def figure_common_tokens(result: ScanSnapResult) -> go.Figure:
    """How far the logits of common tokens fall, with the flow of the theory."""
    law = result.law()
    shown = _shown(result)
    shown = shown[result.step.numpy()[shown] > 0]
    fallen = -(result.class_z() * law.is_common).sum(dim=(1, 2)) / law.is_common.sum()
    step = result.step.numpy()[shown]
    figure = go.Figure()
    figure.add_scatter(
        x=step,
        y=fallen.numpy()[shown],
        name="measured",
        mode="lines",
        line=line_style(SERIES[0]),
    )
    figure.add_scatter(
        x=step,
        y=flow_through_end(result, float(fallen[-1]))[shown],
        name="theory",
        mode="lines",
        line=line_style(SERIES[1], "dash"),
    )
    figure.update_xaxes(log_axis(step.astype(float)), title="updates (steps)")
    figure.update_yaxes(title="fall B = -z (nats)")
    return titled(
        figure,
        "Common tokens lose attention ever more slowly",
        "B: mean over classes and common tokens; theory (Theorem 4, one common token): dB/dt = "
        "eta_Z/C0 gamma(t) exp(-4 B), rates over 1 - momentum, C0 chosen to meet the last point",
        n_text(result),
    )


# Parts of figures


def flow_through_end(result: ScanSnapResult, end: float) -> Float[np.ndarray, " checkpoint"]:
    """B of the theory at every checkpoint, with the C0 that gives ``end`` at the last one."""
    config, kept = result.config, 1 - result.config.momentum
    flow = FlowSettings(
        config.n_classes,
        config.n_tokens,
        config.lr_z * config.lr_ratio / kept,
        config.lr_z / kept,
    )
    last = float(result.step[-1])
    c0 = 4 * flow.rate_z * flow.gamma_integral(last) / np.expm1(4 * max(end, TINY))
    # Steps are long beside t0: the flow needs finer ones, and one that ends at the jump of gamma.
    fine = torch.linspace(0, last, FLOW_STEPS + 1, dtype=torch.float64)
    times = torch.cat([fine, torch.tensor([flow.transition]).double(), result.step.double()])
    times = times[times <= last].unique()
    z = integrate_common_logit(flow.gamma, times, flow.rate_z, float(c0))
    at = torch.searchsorted(times, result.step.double())
    return -z[at].numpy()


def run_text(result: ScanSnapResult) -> str:
    """What was trained on, in few words."""
    config = result.config
    return (
        f"{config.n_classes} classes, {config.n_queries} queries, {config.n_tokens} tokens, "
        f"rates {config.lr_z:g} of Z and {config.lr_z * config.lr_ratio:g} of Y"
    )


def n_text(result: ScanSnapResult) -> str:
    """Over how much the numbers were taken."""
    config = result.config
    return (
        f"n = 1 run (seed {config.seed}) of {int(result.step[-1])} steps of {config.batch_size} "
        f"sequences of {config.n_pos} tokens; {run_text(result)}"
    )


def _shown(result: ScanSnapResult) -> Int[np.ndarray, " shown"]:
    """Checkpoints that are drawn: all, or the first, the last and some between."""
    return choose_positions(len(result.step))


def _chosen_steps(result: ScanSnapResult) -> list[int]:
    last = len(result.step) - 1
    return sorted({max(1, round(last * share)) for share in DRAWN} & {*range(last + 1)})


def _token_name(result: ScanSnapResult, row: int, token: int) -> str:
    kind = "distinct" if bool(result.law().is_distinct[row, token]) else "common"
    return f"{kind} {token}"
