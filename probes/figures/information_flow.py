"""Figures of the information-flow probe: tokens that carry items, and what items give each other."""

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from probes.figures.information_flow_routes import figure_routes
from probes.figures.lines import reference_line
from probes.figures.theme import (
    INK,
    MARK_PX,
    SEQUENTIAL,
    SERIES,
    tick_step,
    titled,
    token_name,
    wrapped,
)
from probes.information_flow import InformationFlowResult
from probes.information_flow_cross import pair_mask
from probes.information_flow_tokens import KEEP_SETS

TINY = 1e-6
LEGEND = {
    "full": "everything",
    "tokens": "the prompt's tokens",
    "pads": "pads behind it",
    "item": "the item alone",
    "removed": "without redundant tokens",
}
"""What a keep-set is called on an axis."""


def figures(result: InformationFlowResult) -> dict[str, go.Figure]:
    """All figures of one result; those of extras only where they were measured."""
    drawn = {"token_scores": figure_token_scores(result), "keep_sets": figure_keep_sets(result)}
    if bool(pair_mask(result.exists()).any()):
        drawn["flow"] = figure_flow(result)
        drawn["leakage"] = figure_leakage(result)
        if result.flow_by_layer is not None:
            drawn["flow_by_layer"] = figure_flow_by_layer(result)
        if result.flow_direct is not None:
            drawn["direct"] = figure_direct(result)
    if result.route_edges is not None:
        drawn["routes"] = figure_routes(result)
    return drawn


def finding(result: InformationFlowResult) -> str:
    """What the result says, in one sentence."""
    found = result.metrics()
    said = [f"{found['representative_rate']:.0%} of items have a token that carries them alone"]
    if "redundant_rate" in found:
        said.append(f"{found['redundant_rate']:.0%} of tokens in longer items do not")
    if "leakage_rate" in found:
        said.append(
            f"{found['leakage_rate']:.0%} of items read as another, {found['leakage_rate_patched']:.0%} "
            "with their own representation put back"
        )
        said.append(f"another item changes an item by {found['mean_flow']:.2f} of its norm")
    return f"{'; '.join(said)} ({n_text(result)})."


def n_text(result: InformationFlowResult) -> str:
    """Over how much the numbers were taken."""
    return f"n = {int(result.exists().sum())} items in {len(result.flow)} prompts"


def figure_token_scores(result: InformationFlowResult) -> go.Figure:
    """The score of every token alone, by its place in its item; the items' own score beside it."""
    own = result.item_mask()
    prompt, item, pos = own.nonzero(as_tuple=True)
    place = own.cumsum(dim=-1)[prompt, item, pos] - 1
    size = own.sum(dim=-1)[prompt, item]
    score = result.keep_score[prompt, pos]
    carries = result.representative[prompt, pos]
    figure = go.Figure()
    kinds = (
        ("representative", carries, SERIES[0], "circle"),
        ("redundant", ~carries, SERIES[1], "x"),
    )
    for name, where, color, symbol in kinds:
        rows = [
            (*row, token_name(result.labels, row[0], row[2], own.shape[-1]))
            for row in torch.stack([prompt, item, pos, size], dim=1)[where].tolist()
        ]
        figure.add_scatter(
            x=place[where].numpy(),
            y=score[where].numpy(),
            customdata=rows,
            mode="markers",
            name=name,
            marker={"color": color, "symbol": symbol, "size": MARK_PX},
            hovertemplate="prompt %{customdata[0]}, item %{customdata[1]}<br>token at position "
            "%{customdata[2]}%{customdata[4]}, one of %{customdata[3]}<br>score %{y:.3f}<extra>"
            + name
            + "</extra>",
        )
    longest = int(size.max())
    figure.update_xaxes(title="place in the item (tokens)", dtick=tick_step(longest))
    figure.update_yaxes(title="score of the token alone (cosine)")
    return titled(
        figure,
        "What each token carries of its item",
        "score: cosine of what is read of the item, when all other positions hold the empty prompt, "
        f"with the item alone; representative: from {result.config.tau:g} of the whole item's score "
        "on, and nearer to it than to any other item",
        n_text(result),
    )


def figure_keep_sets(result: InformationFlowResult) -> go.Figure:
    """Mean score and share of items read correctly under each keep-set."""
    exists = result.exists()
    score = result.keep_set_score[exists].mean(dim=0)
    correct = result.keep_set_correct[exists].float().mean(dim=0)
    measured = ~score.isnan()
    names = wrapped([LEGEND[name] for name, kept in zip(KEEP_SETS, measured, strict=True) if kept])
    figure = go.Figure()
    for name, values in (
        ("mean score (cosine)", score),
        ("read as itself (share of items)", correct),
    ):
        figure.add_bar(
            x=names,
            y=values[measured].numpy(),
            name=name,
            hovertemplate="%{x}: %{y:.3f}<extra>" + name + "</extra>",
        )
    figure.update_yaxes(title="score (cosine), read rightly (share)")
    figure.update_xaxes(title="kept of the prompt (keep-set)")
    return titled(
        figure.update_layout(barmode="group"),
        "What is left of an item under each keep-set",
        "kept positions hold the prompt's encoding, the others that of the empty prompt; an item is "
        "read as itself when its own prototype is the nearest of its prompt's",
        n_text(result),
    )


def mean_over_pairs(
    values: Float[Tensor, "prompt item item"], result: InformationFlowResult
) -> Float[np.ndarray, "item item"]:
    """Mean over the prompts that have both items; NaN where none has."""
    pairs = pair_mask(result.exists())
    total = (values * pairs).sum(dim=0) / pairs.sum(dim=0)
    return np.asarray(total.numpy())


def figure_flow(result: InformationFlowResult) -> go.Figure:
    """The flow matrix, mean over prompts: receiving items down, giving items across."""
    mean = mean_over_pairs(result.flow, result)
    index = [str(item) for item in range(len(mean))]
    heatmap = go.Heatmap(
        z=mean.astype(np.float32),
        x=index,
        y=index,
        zmin=0.0,
        colorscale=SEQUENTIAL,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "flow (share of norm)"}},
        hovertemplate="item %{y} receives %{z:.4f} from item %{x}<extra></extra>",
    )
    figure = go.Figure(heatmap)
    figure.update_xaxes(title="from item (order in the prompt)", type="category")
    figure.update_yaxes(
        title="to item (order in the prompt)", type="category", autorange="reversed"
    )
    return titled(
        figure,
        "What each item receives from the others",
        "flow: |h - h without the other item| / |h| over the receiving item's positions at the end; "
        "exactly 0 from later items in a causal model",
        n_text(result),
    )


def figure_leakage(result: InformationFlowResult) -> go.Figure:
    """Every pair: how much arrives, and how much nearer it brings the item to the other."""
    pairs = pair_mask(result.exists())
    rows = pairs.nonzero().numpy()
    figure = go.Figure()
    figure.add_scatter(
        x=result.flow[pairs].numpy(),
        y=result.leak_score[pairs].numpy(),
        customdata=rows,
        mode="markers",
        name="ordered pair of items",
        marker_size=MARK_PX,
        hovertemplate="prompt %{customdata[0]}: item %{customdata[1]} from item %{customdata[2]}"
        "<br>flow %{x:.3f}<br>leak %{y:.3f}<extra></extra>",
    )
    figure.add_hline(y=0.0, line=reference_line("dot"))
    figure.update_xaxes(title="flow (share of norm)")
    figure.update_yaxes(title="leak (difference of cosines)")
    before, after = result.leakage_rate() or 0.0, result.leakage_rate(patched=True) or 0.0
    return titled(
        figure,
        "Does what arrives make an item look like its neighbour?",
        "leak: cosine of the item with the other's prototype, minus the same without the other item; "
        f"{before:.1%} of items read as another, {after:.1%} with their uncontextualised "
        "representation in their place",
        f"n = {len(rows)} ordered pairs in {len(result.flow)} prompts",
    )


def figure_flow_by_layer(result: InformationFlowResult) -> go.Figure:
    """Where flow enters: mean over prompts, with the standard error."""
    assert result.flow_by_layer is not None
    values = result.flow_by_layer[pair_mask(result.exists()).any(dim=(1, 2))]
    layers = np.arange(values.shape[1])
    spread = values.std(dim=0, correction=1) / len(values) ** 0.5 if len(values) > 1 else None
    figure = go.Figure(
        go.Bar(
            x=layers,
            y=values.mean(dim=0).numpy(),
            error_y=None if spread is None else {"array": spread.numpy(), "color": INK},
            hovertemplate="layer %{x}: %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="layer (index)", dtick=tick_step(len(layers)))
    figure.update_yaxes(title="flow that enters (share of norm)")
    return titled(
        figure,
        "In which layer flow between items enters",
        "difference between the flow that is left when the receiving item is put back to its state "
        "without the other before this block, and before the next; over the layers it sums to the "
        "flow, and a block that takes something back counts below 0",
        f"n = {len(values)} prompts with at least two items; bars: standard error",
    )


def figure_direct(result: InformationFlowResult) -> go.Figure:
    """Flow along direct attention against the whole flow."""
    pairs = pair_mask(result.exists())
    assert result.flow_direct is not None
    whole, direct = result.flow[pairs].numpy(), result.flow_direct[pairs].numpy()
    top = float(max(whole.max(), direct.max(), TINY)) * 1.05
    figure = go.Figure()
    figure.add_scatter(
        x=whole,
        y=direct,
        customdata=pairs.nonzero().numpy(),
        mode="markers",
        name="ordered pair of items",
        marker_size=MARK_PX,
        hovertemplate="prompt %{customdata[0]}: item %{customdata[1]} from item %{customdata[2]}"
        "<br>flow %{x:.3f}<br>direct %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=[0, top],
        y=[0, top],
        mode="lines",
        name="equal",
        line=reference_line("dot"),
        hoverinfo="skip",
    )
    figure.update_xaxes(title="flow: the other item taken away (share of norm)")
    figure.update_yaxes(title="flow: attention to it knocked out (share of norm)")
    return titled(
        figure,
        "How much comes by attention from item to item",
        "direct: change of an item when none of its queries sees a key of the other item, in any "
        "layer and head; what comes by way of other tokens stays",
        f"n = {len(whole)} ordered pairs in {len(result.flow)} prompts",
    )
