"""An intervention with sliders, its heads chosen by clicking or by name."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from app import url
from app.components.config_form import field_input
from app.components.text import plain
from probes.figures.theme import SERIES, TEMPLATE, head_name
from workbench.errors import ConfigError, UnknownNameError

SLIDERS = {
    "gamma": (
        0.05,
        4.0,
        1.5,
        0.05,
        "factor on the attention to the first token; 1 changes nothing",
    ),
    "factor": (0.05, 4.0, 1.5, 0.05, "factor on the attention to the positions; 1 changes nothing"),
    "beta": (0.0, 1.0, 0.4, 0.05, "factor on the attention to sinks; 1 changes nothing"),
    "alpha": (0.5, 20.0, 5.0, 0.5, "a key is a sink above alpha / n of a head's mean attention"),
}
"""Lowest, highest, first value, step and meaning of the numbers that have a slider."""

TENSORS = {
    "vector": "safetensors file with vector [d_model]",
    "mean": "safetensors file with mean [heads d_head]",
}
"""What a file must hold that a setting names; it lies on the machine that serves the page."""

MOST_CELLS = 1600


def intervention_form(n_layers: int, n_heads: int) -> dict[str, Any]:
    """Choose an intervention and its settings; returns the content of an intervention file.

    Raises:
        ConfigError: Heads or a file are missing that the intervention needs.
    """
    from workbench.interventions.files import INTERVENTIONS, VERSION

    names = sorted(INTERVENTIONS)
    url.seed("intervention", url.one_of(names, "intervention"), "zerotuning", "play intervention")
    name = st.selectbox("Intervention", names, key="play intervention")
    url.keep("intervention", name, "zerotuning")
    kind = INTERVENTIONS[name]
    st.caption(plain((kind.__doc__ or "").strip().splitlines()[0].replace("`", "")))
    hints = typing.get_type_hints(kind)
    content: dict[str, Any] = {"name": name, "version": VERSION}
    fields = [field for field in dataclasses.fields(kind) if field.name not in ("name", "heads")]
    for column, field in zip(st.columns(max(len(fields), 1)), fields, strict=False):
        with column:
            content[field.name] = _setting(field, hints[field.name], name, n_layers)
    heads = _heads(n_layers, n_heads)
    for field_name, meaning in TENSORS.items():
        if content.get(field_name) == "":
            raise ConfigError(f"{name} needs {field_name}; no file is named; give a {meaning}")
    needed = any(
        f.name == "heads" and f.default is dataclasses.MISSING for f in dataclasses.fields(kind)
    )
    if needed and not heads:
        raise ConfigError(f"{name} needs heads; none are chosen; click some or name them")
    if "heads" in hints:
        content["heads"] = [list(pair) for pair in heads] or None
    return content


def _setting(field: Any, hint: Any, name: str, n_layers: int) -> Any:
    key, label = f"play {name} {field.name}", field.name.replace("_", " ")
    if field.name in SLIDERS:
        return _slider(field.name, label, key)
    if hint is bool:
        url.seed(field.name, lambda text: text == "True", bool(field.default), key)
        flag = st.toggle(label, key=key)
        url.keep(field.name, str(flag), str(bool(field.default)))
        return bool(flag)
    if field.name == "positions":
        url.seed(field.name, str, "0", key)
        text = st.text_input(label, key=key, help="Positions of the prompt, from 0: 0,3,4")
        url.keep(field.name, text, "0")
        return _positions(text)
    if field.name in TENSORS:
        return _tensor_file(field.name, key)
    choices, first = _choices(field, n_layers)
    if not choices:
        return field_input(field, hint, key)
    url.seed(field.name, url.one_of(choices, field.name), first, key)
    value = st.selectbox(
        label, choices, key=key, help=plain(field.metadata.get("help") or "") or None
    )
    url.keep(field.name, value, first)
    return value


def _slider(name: str, label: str, key: str) -> float:
    low, high, first, step, about = SLIDERS[name]
    url.seed(name, url.number(float, low, high, name), first, key)
    value = st.slider(label, low, high, step=step, key=key, help=about)
    url.keep(name, f"{value:g}", f"{first:g}")
    return float(value)


def _choices(field: Any, n_layers: int) -> tuple[Sequence[str], str]:
    """What a setting may be, where that can be listed, and what it is at first."""
    if field.name == "site":
        sites = _sites(n_layers)
        return sites, f"L{n_layers // 2}.resid_post"
    return field.metadata.get("choices") or (
        ("score", "key") if field.name == "mode" else ()
    ), field.default


def _sites(n_layers: int) -> list[str]:
    """The places of the residual stream that can be edited."""
    from workbench.attention.edits import EDITABLE_SITES
    from workbench.models.base import LAYER_SITES, MODEL_SITES

    inside = [name for name in LAYER_SITES if name in EDITABLE_SITES - {"z"}]
    of_model = [name for name in MODEL_SITES if name in EDITABLE_SITES]
    return [*(f"L{layer}.{name}" for layer in range(n_layers) for name in inside), *of_model]


def _tensor_file(field: str, key: str) -> str:
    """The path of a file that holds a tensor; empty: none is named."""
    url.seed(field, str, "", key)
    text = st.text_input(f"{field} (a file)", key=key, help=plain(TENSORS[field])).strip()
    url.keep(field, text)
    # A run in the background begins in another folder.
    return str(Path(text).expanduser().absolute()) if text else ""


def _positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"positions must be whole numbers like 0,3,4; got {text!r}") from None


def _heads(n_layers: int, n_heads: int) -> list[tuple[int, int]]:
    """The chosen heads; none chosen stands for all."""
    names = {
        head_name(layer, head): (layer, head)
        for layer in range(n_layers)
        for head in range(n_heads)
    }

    def parse(text: str) -> list[str]:
        chosen = [part for part in text.split(",") if part]
        for part in chosen:
            if part not in names:
                raise UnknownNameError("head of this model", part, names)
        return chosen

    widget = "play heads"
    nothing: list[str] = []
    url.seed("heads", parse, nothing, widget)
    st.session_state[widget] = [name for name in st.session_state[widget] if name in names]
    if len(names) <= MOST_CELLS:
        st.plotly_chart(
            _grid(n_layers, n_heads, st.session_state[widget]),
            theme=None,
            key="play grid",
            on_select=_toggle,
            selection_mode="points",
            config={"displayModeBar": False},
            alt="a grid of heads; click one to choose it or to leave it out",
        )
    chosen = st.multiselect("Heads (none: all)", list(names), key=widget)
    url.keep("heads", ",".join(chosen))
    return [names[name] for name in chosen]


def _toggle() -> None:
    """Choose the head that was clicked, or leave it out; runs before the page does."""
    event: Any = st.session_state.get("play grid")
    points = event["selection"]["points"] if event else []
    chosen = list(st.session_state.get("play heads", []))
    for point in points:
        name = head_name(int(point["y"]), int(point["x"]))
        chosen = [kept for kept in chosen if kept != name] if name in chosen else [*chosen, name]
    st.session_state["play heads"] = chosen


def _grid(n_layers: int, n_heads: int, chosen: Sequence[str]) -> go.Figure:
    cells = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    names = [head_name(*cell) for cell in cells]
    figure = go.Figure(
        go.Scatter(
            x=[head for _, head in cells],
            y=[layer for layer, _ in cells],
            mode="markers",
            marker={
                "symbol": ["square" if name in chosen else "square-open" for name in names],
                "size": 18 if n_heads <= 16 else 10,
                "color": [SERIES[1] if name in chosen else "#787878" for name in names],
            },
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate="layer %{y}, head %{x}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head (index)", dtick=max(1, n_heads // 12), showgrid=False)
    figure.update_yaxes(
        title="layer (index)", autorange="reversed", dtick=max(1, n_layers // 12), showgrid=False
    )
    return figure.update_layout(
        template=TEMPLATE,
        clickmode="event+select",
        dragmode=False,
        height=min(120 + 28 * n_layers, 600),
        margin_t=10,
    )
