"""One head's page: its pattern on an example of each domain, with its numbers there."""

import html
import textwrap

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.active_dormant import ActiveDormantResult
from probes.figures.theme import SEQUENTIAL, TALL, head_name, plain, tick_step, titled
from workbench.errors import ConfigError

LABELLED, TOKENS = 64, 24
"""Up to so many tokens, some are written on the axes, and how many at most; of more, their positions."""
LINE = 48
"""Characters in a line of the prompt under its pattern."""
LETTERS_PX, TITLE_PX, TICK_PX = 12, 11, 9
"""Sizes of the headings, of the prompt under a pattern and of the tokens on its axes."""
HEADING_PX = 16
"""What a line of a heading adds to the room above the patterns."""
GAP = 0.3
"""Between the patterns together, as a share of the figure."""


def figure_head(result: ActiveDormantResult, layer: int, head: int) -> go.Figure:
    """The head's pattern on the first prompt of each domain.

    Args:
        result: What the probe found.
        layer: Of the head.
        head: Its index; the pattern must be one that was kept.

    Raises:
        ConfigError: It was not kept.
    """
    kept = [tuple(pair) for pair in result.example_head.tolist()]
    if (layer, head) not in kept:
        raise ConfigError(
            f"the head must be one whose pattern was kept: {', '.join(head_name(*k) for k in kept)}; "
            f"got {head_name(layer, head)}; run the probe with a larger n_examples"
        )
    patterns = np.asarray(result.example_pattern[kept.index((layer, head))])
    names = [plain(name) for name in result.labels["domain"]]
    counted = zip(result.n_prompts.tolist(), names, strict=True)
    figure = make_subplots(
        1,
        len(names),
        subplot_titles=[_numbers(result, d, layer, head) for d in range(len(names))],
        horizontal_spacing=GAP / len(names),
    )
    figure.update_annotations(font_size=LETTERS_PX)
    for d in range(len(names)):
        _draw_pattern(figure, result, patterns[d], d)
    bar = {"title": {"text": "attention (share)"}}
    figure.update_layout(
        coloraxis={"cmin": 0.0, "cmax": 1.0, "colorscale": SEQUENTIAL, "colorbar": bar}
    )
    kind = next(name for name, heads in result.classes().items() if heads[layer, head])
    q_sink, q_loss = result.q_sink[layer, head].item(), result.q_loss[layer, head].item()
    titled(
        figure.update_layout(height=TALL),
        f"Head {head_name(layer, head)}: {kind}",
        "attention of each query (row) to each key (column) on the first prompt of each domain; the "
        "numbers above are means over all its prompts: attention to the first token, loss added when "
        f"the head is zeroed, |v W_O| of the first token over the others'; q of the differences: sink "
        f"{q_sink:.2g}, loss {q_loss:.2g}",
        "n = " + ", ".join(f"{n} prompts of {name}" for n, name in counted) + "; 1 of each shown",
    )
    # A heading of two lines reaches up to the last line of the subtitle.
    return figure.update_layout(margin_t=figure.layout.margin.t + HEADING_PX)


def _numbers(result: ActiveDormantResult, d: int, layer: int, head: int) -> str:
    def at(values: object) -> float:
        return float(np.asarray(values)[d, layer, head])

    state = "dormant" if bool(result.dormant[d, layer, head]) else "active"
    return (
        f"<b>{plain(result.labels['domain'][d])}</b>: {state}<br>sink {at(result.sink_attention):.2f}, "
        f"loss {at(result.ablation_loss):+.3f}, value {at(result.value_norm_ratio):.2f}"
    )


def _draw_pattern(
    figure: go.Figure, result: ActiveDormantResult, pattern: np.ndarray, d: int
) -> None:
    length = int((result.example_tokens[d] >= 0).sum())
    width = result.example_tokens.shape[1]
    texts = [plain(text) for text in result.labels["example_token"][d * width :][:length]]
    # The upper triangle is no attention of zero: those keys lie ahead.
    seen = np.where(np.tri(length, dtype=bool), pattern[:length, :length], np.nan)
    figure.add_heatmap(
        z=seen.astype(np.float32),
        customdata=np.array([[[query, key] for key in texts] for query in texts]),
        coloraxis="coloraxis",
        hovertemplate="query %{y}: %{customdata[0]}<br>key %{x}: %{customdata[1]}<br>"
        "attention %{z:.3f}<extra></extra>",
        row=1,
        col=d + 1,
    )
    axis: dict[str, object] = {"dtick": tick_step(length)}
    if length <= LABELLED:
        ticks = range(0, length, tick_step(length, TOKENS))
        axis |= {
            "tickvals": list(ticks),
            "ticktext": texts[:: ticks.step],
            "tickfont_size": TICK_PX,
        }
        del axis["dtick"]
    title = f"key (token)<br><i>{_beginning(texts)}</i>"
    figure.update_xaxes(axis | {"title": {"text": title, "font_size": TITLE_PX}}, row=1, col=d + 1)
    figure.update_yaxes(
        axis | {"autorange": "reversed", "title": "query (token)"}, row=1, col=d + 1
    )


def _beginning(texts: list[str]) -> str:
    """The example's first words, in two lines."""
    shown = html.unescape(" ".join("".join(texts).split()))
    lines = textwrap.wrap(shown, LINE, max_lines=2, placeholder=" ...")
    return "<br>".join(plain(line) for line in lines)
