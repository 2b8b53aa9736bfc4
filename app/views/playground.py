"""A prompt, an intervention with sliders, and both continuations side by side."""

import html
import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app import models, playing, url
from app.components.both_models import both_models, show_sink_mass, show_tables
from app.components.intervention_file import intervention_file
from app.components.intervention_form import intervention_form
from app.components.layout import page
from app.components.pickers import model_picker
from app.components.text import plain
from app.components.text_area import url_text_area
from probes.figures.heatmap import HeadNumbers, layer_head_heatmap
from probes.figures.theme import SERIES, TEMPLATE, head_name
from workbench.errors import WorkbenchError

EXAMPLE = "Monday, Tuesday, Wednesday,"
SHOWN_KEYS = 64


def playground_page() -> None:
    """Generate twice, stock and edited, and look at what changed."""
    with page("playground", "Playground"):
        name = model_picker("play")
        prompt = url_text_area("prompt", "Prompt", EXAMPLE, "play prompt")
        n_new = _n_new()
        n_layers, n_heads = models.head_counts(name)
        with st.expander("Intervention", expanded=True):
            content = intervention_file() or intervention_form(n_layers, n_heads)
        _save(content, name, n_layers, n_heads)
        if st.button("Generate both", type="primary"):
            _generate(name, prompt, n_new, content)
        else:
            _show_texts()
        _details()


def _n_new() -> int:
    url.seed("tokens", url.whole(1, 256, "tokens"), 24, "play tokens")
    n_new = st.slider("New tokens", 1, 256, key="play tokens")
    url.keep("tokens", str(n_new), "24")
    return int(n_new)


def _save(content: dict[str, Any], name: str, n_layers: int, n_heads: int) -> None:
    st.download_button(
        "Save as an intervention file",
        file_text(content, name, n_layers, n_heads),
        f"{content['name']}.json",
        "application/json",
        on_click="ignore",
        icon=":material/save:",
    )


def file_text(content: dict[str, Any], name: str, n_layers: int, n_heads: int) -> str:
    """What is saved: the intervention and the shape of the model it is for."""
    # The name without its folder: a file that is passed on must not tell where a model lay. What a
    # loaded file says of its model stays.
    about = {"model": name.rstrip("/").rpartition("/")[2], "layers": n_layers, "n_heads": n_heads}
    whole = {key: value for key, value in {**about, **content}.items() if value is not None}
    return json.dumps(whole, indent=1) + "\n"


def _generate(name: str, prompt: str, n_new: int, content: dict[str, Any]) -> None:
    """Both continuations, each written while it grows; the stock one comes first."""
    import torch

    from workbench.generation import sink_mass
    from workbench.interventions.files import as_intervention

    left, right = st.columns(2)
    left.markdown("**Stock**")
    right.markdown("**Edited**")
    places = left.empty(), right.empty()
    with models.using(name) as model:
        edit = as_intervention(content, model.spec)
        ids = playing.prompt_ids(model, prompt, n_new)
        texts = [model.tokenizer.decode([token]) for token in ids]
        found = [
            playing.continue_prompt(model, ids, n_new, change, _writer(place))
            for change, place in zip((None, edit), places, strict=True)
        ]
        try:
            attention = [playing.attention_of_last(model, ids, change) for change in (None, edit)]
        except WorkbenchError as error:
            attention = []
            st.caption(plain(str(error)))
        tokens = torch.tensor([ids])
        masses = [sink_mass(model, tokens, change) for change in (None, edit)]
        paths = [playing.read_by_both(model, ids, said, edit) for said in found]
        tables = both_models(model, paths)
    st.session_state["play found"] = (found, attention, texts, name, tables, masses)


def _writer(place: Any) -> Any:
    return lambda text: place.code(text or " ", language=None, wrap_lines=True)


def _show_texts() -> None:
    if "play found" not in st.session_state:
        return
    found = st.session_state["play found"][0]
    for column, title, said in zip(st.columns(2), ("Stock", "Edited"), found, strict=True):
        column.markdown(f"**{title}**")
        column.code(said.text or " ", language=None, wrap_lines=True)


def _details() -> None:
    if "play found" not in st.session_state:
        st.caption("Nothing has been generated yet.")
        return
    (stock, edited), attention, texts, name, tables, masses = st.session_state["play found"]
    same = stock.tokens == edited.tokens
    st.caption(plain(f"On {name}: " + ("both say the same." if same else "they differ.")))
    with st.expander("Token probabilities", expanded=True):
        st.dataframe(pd.DataFrame(_token_rows(stock, edited)), hide_index=True)
    show_tables(tables)
    if attention:
        st.subheader("Where attention moved")
        show_sink_mass(masses, len(texts))
        _attention(attention, texts)


def _token_rows(stock: Any, edited: Any) -> list[dict[str, str]]:
    rows = []
    for step in range(max(len(stock.tokens), len(edited.tokens))):
        row = {"step": str(step)}
        for title, said in (("stock", stock), ("edited", edited)):
            there = step < len(said.tokens)
            row[title] = repr(said.tokens[step])[1:-1] if there else ""
            row[f"p {title}"] = f"{said.probability[step]:.3f}" if there else ""
            others = said.candidates[step] if there else ()
            row[f"likeliest {title}"] = ", ".join(
                f"{repr(text)[1:-1]} {share:.2f}" for text, share in others
            )
        rows.append(row)
    return rows


def _attention(attention: list[np.ndarray], texts: list[str]) -> None:
    stock, edited = attention
    gap = playing.moved(stock, edited)
    n_layers, n_heads = gap.shape
    st.caption(
        "Of the prompt's last token: the share of its attention that goes elsewhere when edited, by head "
        "(half the sum of differences over keys); n = 1 query."
    )
    st.plotly_chart(
        moved_figure(attention), theme=None, key="play moved", config={"displaylogo": False}
    )
    names = [head_name(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    most = names[int(gap.argmax())]
    url.seed("head", url.one_of(names, "head"), most, "play head")
    if st.session_state["play head"] not in names:
        st.session_state["play head"] = most
    chosen = st.selectbox("Head", names, key="play head")
    url.keep("head", chosen, most)
    layer, head = divmod(names.index(chosen), n_heads)
    st.plotly_chart(
        keys_figure(stock[layer, head], edited[layer, head], texts, chosen),
        theme=None,
        key="play keys",
        config={"displaylogo": False},
    )
    if len(texts) > SHOWN_KEYS:
        st.caption(
            f"{len(texts)} tokens; the first 4 and the last {SHOWN_KEYS - 4} are shown as keys."
        )


def moved_figure(attention: list[np.ndarray]) -> go.Figure:
    """A map of the heads: how much of their attention went elsewhere; stock first, then edited."""
    stock, edited = attention
    gap = playing.moved(stock, edited)
    figure = layer_head_heatmap(
        HeadNumbers("attention moved (share)", gap),
        (HeadNumbers("more to the first token", edited[..., 0] - stock[..., 0], "+.3f"),),
        scale=(0.0, max(float(gap.max()), 1e-6)),
    )
    return figure.update_layout(template=TEMPLATE, margin_t=20)


def keys_figure(stock: np.ndarray, edited: np.ndarray, texts: list[str], name: str) -> go.Figure:
    """Attention of the last token to each key, stock beside edited."""
    n_keys = len(texts)
    keys = list(range(n_keys))
    if n_keys > SHOWN_KEYS:
        keys = [*range(4), *range(n_keys - SHOWN_KEYS + 4, n_keys)]
    labels = [f"{key} {html.escape(repr(texts[key])[1:-1])}" for key in keys]
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "group"})
    for values, title, color, shape in (
        (stock, "stock", SERIES[0], ""),
        (edited, "edited", SERIES[1], "/"),
    ):
        figure.add_bar(
            x=list(range(len(keys))),
            y=values[keys],
            name=title,
            marker={"color": color, "pattern_shape": shape},
            customdata=labels,
            hovertemplate=f"{name}, {title}<br>key %{{customdata}}: %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(
        title="key (position and token)",
        tickvals=list(range(len(keys))),
        ticktext=labels,
        tickangle=-90,
    )
    figure.update_yaxes(title=f"attention of {name} (share)", rangemode="tozero")
    return figure.update_layout(height=420, margin_t=20)
