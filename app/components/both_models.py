"""Two continuations, each read by the stock and the edited model, and where the attention moved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app.components.text import plain
from probes.figures.theme import SERIES, TEMPLATE

if TYPE_CHECKING:
    from workbench.generation import Path


def both_models(model: Any, paths: Sequence["Path"]) -> list[pd.DataFrame]:
    """A table for each continuation: its tokens, what both models say of them, and the change."""
    return [pd.DataFrame(_rows(model, path)) for path in paths]


def _rows(model: Any, path: "Path") -> list[dict[str, str]]:
    pairs = {
        "p": (path.probability_stock, path.probability_edited),
        "entropy": (path.entropy_stock, path.entropy_edited),
    }
    rows = []
    for place, token in enumerate(path.tokens.tolist()):
        row = {"token": repr(model.tokenizer.decode([token]))[1:-1]}
        for name, (stock, edited) in pairs.items():
            before, after = float(stock[place]), float(edited[place])
            row[f"{name} stock"], row[f"{name} edited"] = f"{before:.3f}", f"{after:.3f}"
            row[f"{name} change"] = f"{after - before:+.3f}"
        rows.append(row)
    return rows


def show_tables(tables: Sequence[pd.DataFrame]) -> None:
    """The tables of both continuations, one below the other."""
    with st.expander("Each token under both models", expanded=True):
        st.caption(
            "Probability of the token and entropy (nats) of the distribution it was taken from, both "
            "models reading the same text."
        )
        for title, table in zip(("stock", "edited"), tables, strict=True):
            st.markdown(f"**The tokens of {title}**")
            st.dataframe(table, hide_index=True)


def show_sink_mass(masses: Sequence[Any], n_pos: int) -> None:
    """Attention to the first token of a prompt of ``n_pos`` tokens by layer, before and after."""
    stock, edited = masses
    if stock is None or edited is None:
        return
    st.caption(
        plain(
            "Attention to the first token: mean over heads and the prompt's queries after it; "
            f"n = {n_pos - 1} queries."
        )
    )
    st.plotly_chart(
        sink_mass_figure(stock.numpy(), edited.numpy()),
        theme=None,
        key="play sink mass",
        config={"displaylogo": False},
    )


def sink_mass_figure(stock: np.ndarray, edited: np.ndarray) -> go.Figure:
    """Attention to the first token by layer, stock beside edited; ``[layer]`` each."""
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "group"})
    for values, title, color, shape in (
        (stock, "stock", SERIES[0], ""),
        (edited, "edited", SERIES[1], "/"),
    ):
        figure.add_bar(
            x=list(range(len(values))),
            y=values,
            name=title,
            marker={"color": color, "pattern_shape": shape},
            hovertemplate=f"{title}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="layer (index)", dtick=max(1, len(stock) // 12))
    figure.update_yaxes(title="attention to the first token (share)", range=[0, 1])
    return figure.update_layout(height=300, margin_t=20)
