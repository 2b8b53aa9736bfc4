"""Figures of the successor-heads probe: which head, on which series, by which digits."""

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from probes.figures.heatmap import HeadNumbers, layer_head_heatmap
from probes.figures.lines import head_points
from probes.figures.successor_heads_digits import (
    figure_digit_features,
    figure_probe,
    figure_steering,
    figure_steering_by_scale,
)
from probes.figures.theme import (
    INK,
    MARK_PX,
    POINTS,
    SHARES,
    head_name,
    rows_height,
    titled,
    wrapped,
)
from probes.successor_heads import SuccessorHeadsResult

ROW_PX = 22


def figures(result: SuccessorHeadsResult) -> dict[str, go.Figure]:
    """All figures of one result; those of parts that were not measured are left out."""
    drawn = {
        "heads": figure_heads(result),
        "tasks": figure_tasks(result),
        "filter": figure_filter(result),
    }
    if result.list_attention is not None:
        drawn["attention"] = figure_attention(result)
    if result.mod10_features is not None:
        drawn["steering"] = figure_steering(result)
        drawn["steering_by_scale"] = figure_steering_by_scale(result)
        drawn["digit_features"] = figure_digit_features(result)
        drawn["probe"] = figure_probe(result)
    if result.winning_share is not None:
        drawn["text"] = figure_text(result)
    if result.winning_categories is not None:
        drawn["categories"] = figure_categories(result)
    return drawn


def finding(result: SuccessorHeadsResult) -> str:
    """What the result says, in one sentence."""
    metrics = result.metrics()
    layer, head = result.best
    said = [
        f"{head_name(layer, head)} finds the next item of {metrics['best_score']:.1%} of "
        f"{n_pairs(result)} pairs (chance {metrics['chance']:.1%})"
    ]
    if "second_score" in metrics:
        said.append(f"the runner-up of {metrics['second_score']:.1%}")
    if "list_attention" in metrics:
        said.append(
            f"it gives the last item of a list {metrics['list_attention']:.0%} of its attention"
        )
    if "probe_accuracy" in metrics:
        said.append(
            f"a probe of the last digit, fitted on numbers, is right on {metrics['probe_accuracy']:.0%} "
            f"of {metrics['probe_tokens']:.0f} items of other series (chance 10%)"
        )
    elif "left_out" in result.labels:
        said.append(f"features and steering left out: {result.labels['left_out'][0]}")
    return f"{'; '.join(said)} ({path_text(result)})."


def path_text(result: SuccessorHeadsResult) -> str:
    """Which options the effective OV circuit was made with."""
    config = result.config
    if not config.mlp0:
        return "embedding without the first MLP"
    norm = "ln2, " if config.ln == "ln2" else ""
    residual = " plus embedding" if config.include_residual else ""
    return f"{norm}first MLP{residual}, forms: {config.forms}"


def n_pairs(result: SuccessorHeadsResult) -> int:
    """All pairs of single tokens."""
    return int(result.n_pairs.sum())


def n_text(result: SuccessorHeadsResult) -> str:
    """What every figure of weights states."""
    return f"n = {n_pairs(result)} pairs of {len(result.n_pairs)} series; {path_text(result)}"


def _numpy(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.float().numpy()
    return array


def figure_heads(result: SuccessorHeadsResult) -> go.Figure:
    """Which heads: layer x head, the share of pairs found."""
    others = [HeadNumbers("mean over series (share)", _numpy(result.macro_score()))]
    if result.greater_than_bias is not None:
        others.append(HeadNumbers("greater-than bias (SD)", _numpy(result.greater_than_bias)))
    if result.list_attention is not None:
        others.append(HeadNumbers("attention in lists (share)", _numpy(result.list_attention)))
    figure = layer_head_heatmap(
        HeadNumbers("score (share of pairs)", _numpy(result.score)), others, scale=(0.0, 1.0)
    )
    layer, head = result.best
    return titled(
        figure,
        f"Successor heads: the best is {head_name(layer, head)}",
        "score: share of pairs (item, next item) for which the effective OV circuit puts the next item "
        "strictly above all others of its series",
        n_text(result),
    )


def figure_tasks(result: SuccessorHeadsResult) -> go.Figure:
    """The two best heads on every series."""
    n_heads = result.score.shape[1]
    tasks = wrapped(result.labels["task"])
    flat = result.score_by_task.flatten(1)
    ranked = result.score.flatten().argsort(descending=True, stable=True)[:2].tolist()
    figure = go.Figure()
    for index in ranked:
        figure.add_bar(
            x=tasks,
            y=_numpy(flat[:, index]),
            name=head_name(*divmod(index, n_heads)),
            customdata=result.n_pairs.numpy(),
            hovertemplate="%{x}: %{y:.1%} of %{customdata} pairs",
        )
    figure.update_xaxes(title="series (name)")
    figure.update_yaxes(title="pairs found (share)", range=SHARES)
    return titled(
        figure.update_layout(barmode="group"),
        "The best heads by series",
        "share of a series' pairs for which the next item is the strict maximum",
        n_text(result),
    )


def figure_filter(result: SuccessorHeadsResult) -> go.Figure:
    """What the single-token filter left of every series and written form."""
    lines = result.labels["filter"]
    names = [line.split(": ")[0] for line in lines]
    items, kept, pairs = result.filter_counts.T.numpy()
    figure = go.Figure()
    for name, values in (("single tokens", kept), ("pairs", pairs)):
        figure.add_bar(
            y=names,
            x=(values / items).astype(np.float32),
            orientation="h",
            name=name,
            customdata=list(lines),
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(title="kept (share of the series' items)", range=SHARES)
    figure.update_yaxes(title="series (written form)", autorange="reversed", dtick=1)
    return titled(
        figure.update_layout(height=rows_height(len(lines), ROW_PX), barmode="group"),
        "What the tokenizer keeps in one token",
        "only items that are one token count, and only pairs of two of them; a form needs two pairs "
        "to be scored",
        f"n = {int(items.sum())} written items, {int(kept.sum())} of them single tokens",
    )


def figure_attention(result: SuccessorHeadsResult) -> go.Figure:
    """Score against attention: a head is of use where it has both."""
    assert result.list_attention is not None
    points = head_points(
        _numpy(result.score),
        _numpy(result.list_attention),
        HeadNumbers("mean over series", _numpy(result.macro_score())),
    )
    points.update(marker={"size": MARK_PX, "line": {"color": INK, "width": 1}})
    figure = go.Figure(points)
    figure.update_xaxes(title="score (share of pairs)", range=POINTS)
    figure.update_yaxes(title="attention to the last item (share)", range=POINTS)
    return titled(
        figure,
        "Does the head look at the item?",
        "the score leaves attention out; here lists of three successive items are shown, and attention "
        "from the last token to the last item is read, mean over lists",
        n_text(result),
    )


def figure_text(result: SuccessorHeadsResult) -> go.Figure:
    """On text: how often each head's ablation hurts the correct token the most."""
    assert result.winning_share is not None
    assert result.direct_effect is not None
    figure = layer_head_heatmap(
        HeadNumbers("prefixes won (share)", _numpy(result.winning_share)),
        [HeadNumbers("direct effect (logits)", _numpy(result.direct_effect))],
    )
    return titled(
        figure,
        "Which head the correct token needs the most",
        "a head wins a prefix when replacing its output by its mean, on the direct path to the logits "
        "alone, lowers the correct token's logit the most",
        f"n = {result.metrics()['n_prefixes']:.0f} prefixes",
    )


def figure_categories(result: SuccessorHeadsResult) -> go.Figure:
    """On text: what the prefixes are that the best head wins."""
    assert result.winning_categories is not None
    figure = go.Figure()
    for row, name in enumerate(result.labels["judged"]):
        figure.add_bar(
            x=list(result.labels["category"]),
            y=_numpy(result.winning_categories[row]),
            name=name,
        )
    figure.update_xaxes(title="category (first that applies)")
    figure.update_yaxes(title="cases (share)", range=SHARES)
    return titled(
        figure.update_layout(barmode="group"),
        f"Prefixes that {head_name(*result.best)} wins",
        "by what the correct token has to do with the tokens that the head attends to",
        f"n = {result.metrics()['n_winning']:.0f} prefixes won of "
        f"{result.metrics()['n_prefixes']:.0f}",
    )
