"""Figures of the scan-snap sweep: how sparse attention ended, by learning rates."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.figures.theme import SEQUENTIAL, titled
from toy_tasks.scan_snap_panels import ScanSnapSweepResult

GAP = 0.04
"""Between panels that share an axis."""


def figures(result: ScanSnapSweepResult) -> dict[str, go.Figure]:
    """The panels of entropies, and those of attention on common tokens."""
    return {
        "entropy": figure_panels(
            result,
            result.mean_entropy().numpy(),
            result.entropy_error().numpy(),
            name="entropy (nats)",
            title="A slow decoder lets attention grow sparser",
            meaning="entropy of attention among distinct tokens at the end, mean over classes and "
            "seeds; bright: sparse",
        ),
        "common_mass": figure_panels(
            result,
            result.common_mass.nanmean(dim=-1).numpy(),
            None,
            name="on common tokens (share)",
            title="How much attention is left on common tokens",
            meaning="share of attention on common tokens at the end, mean over classes and seeds",
        ),
    }


def finding(result: ScanSnapSweepResult) -> str:
    """What the panels say, in one sentence."""
    found = result.metrics()
    said = [
        f"entropy among distinct tokens ends between {found['entropy_min']:.3f} and "
        f"{found['entropy_max']:.3f} nats"
    ]
    # A list of one rate has no steps, and of none is nothing to say.
    steps = {
        "falls_with_lr_z": "it falls with lr_z in {:.0%} of the steps",
        "rises_with_lr_ratio": "it rises with lr_ratio from 2 on in {:.0%} of the steps",
    }
    said += [text.format(found[name]) for name, text in steps.items() if np.isfinite(found[name])]
    lost = f"; {found['n_diverged']:.0f} diverged" if found["n_diverged"] else ""
    return f"{'; '.join(said)} ({found['n_runs']:.0f} runs{lost})."


def figure_panels(
    result: ScanSnapSweepResult,
    values: np.ndarray,
    errors: np.ndarray | None,
    *,
    name: str,
    title: str,
    meaning: str,
) -> go.Figure:
    """One heat map a number of queries: ratios across, rates of Z upwards, on one colour scale.

    Args:
        result: The sweep.
        values: ``[panel lr_z lr_ratio]``.
        errors: Of the values; None: not shown.
        name: Of the values, with their unit.
        title: What they say.
        meaning: What they are.
    """
    config = result.config
    headings = [f"{n} {'query' if n == 1 else 'queries'}" for n in config.n_queries]
    figure = make_subplots(
        1, len(headings), subplot_titles=headings, shared_yaxes=True, horizontal_spacing=GAP
    )
    finite = values[np.isfinite(values)]
    spread = "" if errors is None else " +- %{customdata:.3f}"
    for column, panel in enumerate(values, start=1):
        error = np.zeros_like(panel) if errors is None else errors[column - 1]
        figure.add_heatmap(
            x=[f"{ratio:g}" for ratio in config.lr_ratio],
            y=[f"{rate:g}" for rate in config.lr_z],
            z=panel,
            customdata=error,
            zmin=float(finite.min()) if finite.size else 0.0,
            zmax=float(finite.max()) if finite.size else 1.0,
            colorscale=SEQUENTIAL,
            reversescale=True,
            showscale=column == len(headings),
            colorbar={"title": {"text": name}},
            texttemplate="%{z:.2f}",
            hovertemplate=f"eta_Z %{{y}}, eta_Y/eta_Z %{{x}}: %{{z:.3f}}{spread}<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title="eta_Y / eta_Z (ratio)", type="category", row=1, col=column)
        heading = "eta_Z (rate)" if column == 1 else None
        figure.update_yaxes(title=heading, type="category", row=1, col=column)
    return titled(figure, title, meaning, _n_text(result))


def _n_text(result: ScanSnapSweepResult) -> str:
    config = result.config
    return (
        f"n = {config.n_seeds} runs a cell (seeds {config.seeds[0]} to {config.seeds[-1]}) of "
        f"{config.steps} steps of {config.batch_size} sequences of {config.n_pos} tokens"
    )
