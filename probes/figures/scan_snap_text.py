"""Figure of the scan-snap experiment on text: attention grows sparse, and stops moving."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.figures.lines import line_style
from probes.figures.theme import BELOW, BESIDE, DASHES, INK, SERIES, TALL, titled
from toy_tasks.scan_snap_text import ScanSnapTextResult


def figures(result: ScanSnapTextResult) -> dict[str, go.Figure]:
    """The one figure."""
    return {"attention": figure_attention(result)}


def finding(result: ScanSnapTextResult) -> str:
    """What the run says, in one sentence."""
    found = result.metrics()
    return (
        f"the entropy of the first layer's attention went from {found['first_entropy']:.2f} to "
        f"{found['entropy']:.2f} of that of even attention, its largest weight from "
        f"{found['first_top_attention']:.2f} to {found['top_attention']:.2f}; from one checkpoint to "
        f"the next it moved by {found['peak_change']:.2f} at most and by {found['last_change']:.3f} "
        f"at the end ({found['n_steps']:.0f} steps, seed {result.config.seed})."
    )


def figure_attention(result: ScanSnapTextResult) -> go.Figure:
    """Sparsity, movement and common words by layer, and the losses, on a log axis of steps."""
    step = result.step.double().numpy()
    panels = {
        "entropy over even (share)": result.entropy,
        "moved since before (share)": result.change,
        "on common words (ratio)": result.common_ratio,
    }
    headings = ["entropy of attention", "change between checkpoints", "common words", "loss"]
    figure = make_subplots(
        2, 2, subplot_titles=headings, vertical_spacing=BELOW, horizontal_spacing=BESIDE
    )
    for panel, title in enumerate([*panels, "loss (nats a word)"]):
        figure.update_yaxes(title=title, row=panel // 2 + 1, col=panel % 2 + 1)
    for panel, values in enumerate(panels.values()):
        for layer in range(values.shape[1]):
            figure.add_scatter(
                x=step + 1,
                y=values[:, layer].numpy(),
                name=f"layer {layer}",
                legendgroup=f"layer {layer}",
                showlegend=panel == 0,
                mode="lines+markers",
                line=line_style(SERIES[layer % len(SERIES)], DASHES[layer % len(DASHES)]),
                row=panel // 2 + 1,
                col=panel % 2 + 1,
            )
    losses = {"held-out": (result.loss, "solid"), "training text": (result.train_loss, "dot")}
    for name, (loss, dash) in losses.items():
        figure.add_scatter(
            x=step + 1, y=loss.numpy(), name=name, line=line_style(INK, dash), row=2, col=2
        )
    figure.update_xaxes(title="updates + 1 (steps)", type="log", dtick=1)
    figure.update_yaxes(rangemode="tozero")
    config = result.config
    return titled(
        figure.update_layout(height=TALL),
        "On text, attention grows sparse under plain SGD",
        f"means over heads and the later half of the queries; change: total variation distance; "
        f"ratio below 1: the most frequent words are avoided; SGD with rate {config.lr:g}",
        f"n = 1 run (seed {config.seed}), {config.n_held_out} held-out prompts of {config.n_pos} words",
    )
