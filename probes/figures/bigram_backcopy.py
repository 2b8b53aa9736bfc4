"""Figures of the Bigram-Backcopy toy: how a head turns active on triggers and dormant elsewhere."""

import plotly.graph_objects as go
from torch import Tensor

from probes.figures.lines import line_style
from probes.figures.theme import SERIES, titled
from toy_tasks.bigram_backcopy import BigramBackcopyResult


def figures(result: BigramBackcopyResult) -> dict[str, go.Figure]:
    """All figures of one run."""
    return {"dormancy": figure_dormancy(result), "risks": figure_risks(result)}


def finding(result: BigramBackcopyResult) -> str:
    """What the run says, in one sentence."""
    found = result.metrics()
    return (
        f"{found['sink_attention']:.0%} of the attention of queries that are no triggers goes to the "
        f"first token, whose |v W_O| is {found['value_drain']:.2f} times the others'; without attention "
        f"the backcopy risk is {found['backcopy_risk_no_attention']:.2f} nats instead of "
        f"{found['backcopy_risk']:.3f} (step {int(result.step[-1])}, seed {result.config.seed})."
    )


def figure_dormancy(result: BigramBackcopyResult) -> go.Figure:
    """Sink attention and value drain along training."""
    drain = result.value_norm_bos / result.value_norm_rest
    lines = {"attention to the first token": result.sink_attention, "|v W_O| there / rest": drain}
    return _curves(result, lines, "The head falls dormant", "share, ratio")


def figure_risks(result: BigramBackcopyResult) -> go.Figure:
    """Excess risk on triggers and elsewhere along training."""
    lines = {"backcopy (triggers)": result.backcopy_risk, "bigram (others)": result.bigram_risk}
    return _curves(result, lines, "What is learned when", "excess risk (nats)")


def _curves(
    result: BigramBackcopyResult, lines: dict[str, Tensor], title: str, unit: str
) -> go.Figure:
    figure = go.Figure()
    # Step 0 has no place on a logarithmic axis.
    for color, (name, values) in zip(SERIES, lines.items(), strict=False):
        figure.add_scatter(
            x=result.step[1:].tolist(),
            y=values[1:].tolist(),
            name=name,
            mode="lines+markers",
            line=line_style(color),
        )
    figure.update_xaxes(title_text="step (log scale)", type="log")
    figure.update_yaxes(title_text=unit)
    n = f"n = {len(result.step)} checkpoints of one run, seed {result.config.seed}"
    return titled(figure, title, "means over held-out sequences, position 0 excluded", n)
