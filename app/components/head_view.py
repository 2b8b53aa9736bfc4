"""One head: what it attends to on a prompt, and what other probes say about it."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app import data, jobs, models, url
from app.components.pickers import model_picker
from app.components.text import plain
from app.components.text_area import url_text_area
from probes.figures.theme import SEQUENTIAL, head_name, titled
from workbench.errors import ConfigError, WorkbenchError
from workbench.result import Result

WINDOW = 64
"""Queries and keys that one picture shows; token names stay readable."""
MOST_TOKENS = 4096
EXAMPLE = "One two three four five six. When the night came, the old man went home. One two three"


def head_view(n_layers: int, n_heads: int, clicked: tuple[int, int] | None, result: Result) -> None:
    """The head that was clicked or named, its pattern on a prompt, its scores elsewhere."""
    layer, head = _choose(n_layers, n_heads, clicked)
    st.subheader(f"Head {head_name(layer, head)}")
    _scores(result, layer, head)
    st.markdown("**What it attends to**")
    place = _place_of(result.model)
    name = model_picker("head", place or "demo", name="on")
    if not place and name == "demo":
        st.caption(
            plain(f"Where {result.model} lies is not known here: choose or type its folder.")
        )
    if result.edit:
        st.caption("The pattern is that of the stock model, without the edit.")
    prompt = url_text_area("prompt", "Prompt", EXAMPLE, "head prompt")
    url.seed(
        "pattern",
        lambda text: url.one_of(("yes", "no"), "pattern")(text) == "yes",
        False,
        "head pattern",
    )
    shown = st.toggle(
        "Show its pattern", key="head pattern", help="Loads the model into the dashboard."
    )
    url.keep("pattern", "yes" if shown else "no", "no")
    if shown:
        try:
            _pattern(name, prompt, layer, head)
        except WorkbenchError as error:
            st.error(plain(str(error)))


def _place_of(model: str) -> str:
    """What a measured model is loaded by; "" where only its name is known."""
    if model == "demo":
        return model
    for job in jobs.listing(data.store_path(), limit=60):
        asked = str(job.request.about.get("model") or "")
        if asked == model or Path(asked.removeprefix("toy:")).name == model:
            return asked
    return ""


def _choose(n_layers: int, n_heads: int, clicked: tuple[int, int] | None) -> tuple[int, int]:
    names = {
        head_name(layer, head): (layer, head)
        for layer in range(n_layers)
        for head in range(n_heads)
    }
    widget = "head name"
    url.seed("head", url.one_of(names, "head"), next(iter(names)), widget)
    told = None if clicked is None else head_name(*clicked)
    if told in names and st.session_state.get("head clicked") != told:
        st.session_state[widget] = told
    st.session_state["head clicked"] = told
    if st.session_state[widget] not in names:
        st.session_state[widget] = next(iter(names))
    name = st.selectbox("Head (click a cell of the map, or choose)", list(names), key=widget)
    url.keep("head", name, next(iter(names)))
    return names[name]


def _scores(result: Result, layer: int, head: int) -> None:
    """What the newest result of every probe on the model, edited alike, says about one head."""
    rows = []
    seen = set()
    for entry in data.entries_of(model=result.model, edit=result.edit):
        if entry.probe in seen:
            continue
        seen.add(entry.probe)
        try:
            table = data.table_of(entry.key)
        except WorkbenchError:
            continue
        rows += _rows_of(entry.probe, table, layer, head)
    if rows:
        frame = pd.DataFrame(rows, columns=["probe", "measure", "value"])
        st.dataframe(frame, hide_index=True)
    else:
        st.caption("No table of a probe has a row for this head.")


def _rows_of(
    probe: str, table: dict[str, list[Any]], layer: int, head: int
) -> list[tuple[str, str, str]]:
    if not {"layer", "head"} <= set(table):
        return []
    frame = pd.DataFrame(table)
    found = frame[(frame["layer"] == layer) & (frame["head"] == head)].drop(
        columns=["layer", "head"]
    )
    if found.empty:
        return []
    rows = []
    # A probe with several rows a head (positions, prompts) is summed up by their mean.
    for name in found.columns:
        values = found[name]
        if pd.api.types.is_numeric_dtype(values):
            of = f", mean of {len(values)} rows" if len(values) > 1 else ""
            rows.append((probe, f"{name}{of}", f"{float(values.mean()):.4g}"))
        elif len(values) == 1:
            rows.append((probe, str(name), str(values.iloc[0])))
    return rows


def _pattern(name: str, prompt: str, layer: int, head: int) -> None:
    import torch

    with models.using(name) as model:
        ids = _tokens(model, prompt)
        spec = model.spec
        if layer >= spec.n_layers or head >= spec.n_heads:
            raise ConfigError(
                f"the head must be one of {spec.n_layers} layers x {spec.n_heads} heads of "
                f"{spec.name}; got {head_name(layer, head)}; choose the model that was measured"
            )
        texts = [model.tokenizer.decode([token]) for token in ids]
        start = _window(len(ids))
        shown = list(range(start, min(start + WINDOW, len(ids))))
        rows = pattern_rows(model, torch.tensor([ids]), layer, shown)[head]
    keys = sorted({*range(min(4, len(ids))), *shown})
    figure = pattern_figure(rows[:, keys], texts, shown, keys, head_name(layer, head))
    st.plotly_chart(figure, theme=None, key="head pattern figure", config={"displaylogo": False})
    if len(ids) > WINDOW:
        outside = float(1 - rows[:, keys].sum(axis=1).mean())
        st.caption(
            f"{len(ids)} tokens; queries {shown[0]} to {shown[-1]} are shown, with those keys and the "
            f"first 4. {outside:.1%} of their attention goes to keys that are not shown."
        )


def _tokens(model: Any, prompt: str) -> list[int]:
    if not prompt.strip():
        raise ConfigError("a pattern needs a prompt; the field is empty; type a text")
    if model.tokenizer is None:
        raise ConfigError("a pattern of a text needs a tokenizer; this model has none")
    ids = list(model.tokenizer(prompt)["input_ids"])
    limit = min(MOST_TOKENS, model.spec.n_ctx)
    if len(ids) > limit:
        raise ConfigError(f"a prompt must have at most {limit} tokens here; it has {len(ids)}")
    return ids


def _window(n_tokens: int) -> int:
    if n_tokens <= WINDOW:
        return 0
    last = n_tokens - WINDOW
    url.seed("window", url.whole(0, last, "window"), 0, "head window")
    st.session_state["head window"] = min(st.session_state["head window"], last)
    start = st.slider(f"First query of {n_tokens} tokens", 0, last, key="head window")
    url.keep("window", str(start), "0")
    return int(start)


def pattern_rows(model: Any, tokens: Any, layer: int, queries: list[int]) -> np.ndarray:
    """The attention of some queries, ``[head query k_pos]``; the whole pattern is never made."""
    import torch

    from workbench.attention.rows import PatternRows
    from workbench.models.base import Site

    site = Site("pattern", layer)
    read = {"pattern": PatternRows(torch.tensor([queries]))}
    found: np.ndarray = model.capture(tokens, [site], reduce=read)[site][0].cpu().numpy()
    return found


def pattern_figure(
    values: np.ndarray, texts: list[str], queries: list[int], keys: list[int], name: str
) -> go.Figure:
    """A head's attention, rows the queries, with the tokens on both axes."""
    names = [html.escape(repr(text)[1:-1]) or "(empty)" for text in texts]
    seen = np.where(np.asarray(keys)[None, :] <= np.asarray(queries)[:, None], values, np.nan)
    hover = [[[names[query], query, names[key], key] for key in keys] for query in queries]
    figure = go.Figure(
        go.Heatmap(
            z=seen.astype(np.float32),
            customdata=hover,
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "attention", "side": "right"}, "thickness": 14},
            hovertemplate="query %{customdata[1]}: %{customdata[0]}<br>key %{customdata[3]}: "
            f"%{{customdata[2]}}<br>{name}: %{{z:.3f}}<extra></extra>",
            hoverongaps=False,
        )
    )
    ticks = {"tickfont_size": 9, "showgrid": False}
    figure.update_xaxes(
        title="key (token)", tickvals=list(range(len(keys))), ticktext=[names[k] for k in keys],
        tickangle=-90, **ticks,
    )  # fmt: skip
    figure.update_yaxes(
        title="query (token)", tickvals=list(range(len(queries))),
        ticktext=[names[q] for q in queries], autorange="reversed", **ticks,
    )  # fmt: skip
    titled(
        figure,
        f"{name}: attention of each query to each key",
        "softmax weights of one head on one prompt; the upper triangle lies ahead",
        f"n = {len(queries)} queries",
    )
    return figure.update_layout(height=int(np.clip(240 + 10 * len(queries), 380, 860)))
