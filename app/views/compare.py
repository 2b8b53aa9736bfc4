"""Two to six results beside each other: numbers, figures on the same axes, differences."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import streamlit as st

from app import data, url
from app.components import compare_figures as drawing
from app.components.layout import page
from app.components.result_view import MOST_OFFERED, label_of
from app.components.text import plain
from workbench.card import number_text
from workbench.errors import ConfigError, StoreError, WorkbenchError
from workbench.result import Result

FEWEST, MOST = 2, 6


def compare_page() -> None:
    """Models, checkpoints, settings, stock against edited: whatever was measured by one probe."""
    with page("compare", "Compare"):
        entries = data.entries_of()
        if len(entries) < FEWEST:
            st.info("Comparing needs two results in the store; start runs on the probes' pages.")
            return
        keys = _choose(entries)
        if len(keys) < FEWEST:
            st.info(
                f"Choose {FEWEST} to {MOST} results; the first is what the others are compared to."
            )
            return
        results = {key: data.open_result(key) for key in keys}
        names = _names(results)
        _numbers(results, names)
        if len({result.probe for result in results.values()}) > 1:
            st.info("Figures are compared within one probe; these results come from several.")
            return
        _figures(results, names)


def _choose(entries: list[Any]) -> list[str]:
    probes = sorted({entry.probe for entry in entries})
    url.seed("probe", url.one_of(probes, "probe"), probes[0], "compare probe")
    if st.session_state["compare probe"] not in probes:
        st.session_state["compare probe"] = probes[0]
    probe = st.selectbox("Probe", probes, key="compare probe")
    url.keep("probe", probe, probes[0])
    known = {entry.key: entry for entry in entries}
    offered = [entry.key for entry in entries if entry.probe == probe][:MOST_OFFERED]

    def parse(text: str) -> list[str]:
        keys = [_whole_key(part) for part in text.split(",") if part]
        if len(keys) > MOST:
            raise ConfigError(f"at most {MOST} results can be compared; the URL names {len(keys)}")
        return keys

    url.seed("keys", parse, offered[:FEWEST], "compare keys")
    chosen = [key for key in st.session_state["compare keys"] if key in known]
    if any(known[key].probe == probe for key in chosen) or not chosen:
        chosen = chosen or offered[:FEWEST]
    else:  # another probe was chosen
        chosen = offered[:FEWEST]
    st.session_state["compare keys"] = chosen
    options = list(dict.fromkeys([*chosen, *offered]))
    keys = st.multiselect(
        "Results",
        options,
        key="compare keys",
        max_selections=MOST,
        format_func=lambda key: label_of(known[key]),
    )
    url.keep("keys", ",".join(key[:12] for key in keys))
    return list(keys)


def _whole_key(part: str) -> str:
    from workbench.store.results import Store

    key = Store(data.store_path(), report=lambda _: None).resolve(part)
    if key not in {entry.key for entry in data.entries_of()}:
        raise StoreError(f"no result has the key {part!r} in this store")
    return key


def _names(results: dict[str, Result]) -> dict[str, str]:
    """A short name of each: the model, and the settings in which they differ."""
    names: dict[str, str] = {}
    for key, result in results.items():
        name = " ".join(filter(None, _parts_of_name(result, results)))[:60]
        names[key] = name if name not in names.values() else f"{name} {key[:6]}"
    return names


def _parts_of_name(result: Result, results: dict[str, Result]) -> Iterator[str]:
    made = result.provenance
    yield result.model or result.probe
    if made.get("revision") and _differ(results, "revision"):
        yield str(made["revision"])[:8]
    if _differ(results, "prompts"):
        yield str((made.get("prompts") or {}).get("source", ""))
    for name in _differing_settings(results)[:3]:
        yield f"{name}={result.config.get(name)}"
    if len({other.edit for other in results.values()}) > 1:
        yield result.edit or "stock"


def _differing_settings(results: dict[str, Result]) -> list[str]:
    configs = [result.config for result in results.values()]
    names = sorted({name for config in configs for name in config})
    return [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]


def _differ(results: dict[str, Result], name: str) -> bool:
    return len({repr(result.provenance.get(name)) for result in results.values()}) > 1


def _numbers(results: dict[str, Result], names: dict[str, str]) -> None:
    metrics = {names[key]: result.metrics() for key, result in results.items()}
    frame = pd.DataFrame(metrics)
    base = next(iter(metrics))
    shown = frame.map(lambda value: "" if pd.isna(value) else number_text(float(value)))
    for place, name in enumerate(list(metrics)[1:], start=2):
        gap = frame[name] - frame[base]
        shown[f"column {place} minus 1"] = gap.map(lambda v: "" if pd.isna(v) else f"{v:+.4g}")
    st.dataframe(shown.rename_axis("metric").reset_index(), hide_index=True)


def _figures(results: dict[str, Result], names: dict[str, str]) -> None:
    drawn: dict[str, dict[str, Any]] = {}
    for key in results:
        try:
            drawn[names[key]] = data.figures_of(key)
        except WorkbenchError as error:
            st.error(plain(f"{names[key]}: {error}"))
    if len(drawn) < FEWEST:
        return
    common = [name for name in next(iter(drawn.values())) if all(name in f for f in drawn.values())]
    usable = [name for name in common if _kind(drawn, name)]
    if not usable:
        st.info("No figure of these results can be laid on common axes; the numbers are above.")
        return
    url.seed("figure", url.one_of(usable, "figure"), usable[0], "compare figure")
    if st.session_state["compare figure"] not in usable:
        st.session_state["compare figure"] = usable[0]
    name = st.selectbox(
        "Figure", usable, key="compare figure", format_func=lambda name: name.replace("_", " ")
    )
    url.keep("figure", name, usable[0])
    figures = {who: found[name] for who, found in drawn.items()}
    _show(figures, _kind(drawn, name), name)


def _kind(drawn: dict[str, dict[str, Any]], name: str) -> str:
    kinds = {drawing.kind_of(found[name]) for found in drawn.values()}
    return kinds.pop() if len(kinds) == 1 else ""


def _show(figures: dict[str, Any], kind: str, name: str) -> None:
    for who, figure in figures.items():
        caption = (figure.layout.title.subtitle.text or "").replace("<br>", " ")
        st.caption(plain(f"{who}: {caption}"))
    config = {"displaylogo": False}
    note = ""
    if kind == "map":
        together = drawing.side_by_side(figures)
        gap, gap_note = drawing.map_differences(figures)
    else:
        together, note = drawing.overlaid(figures)
        gap, gap_note = drawing.line_differences(figures)
    alt = f"{name.replace('_', ' ')} of {len(figures)} results"
    st.plotly_chart(together, theme=None, key="compare together", config=config, alt=alt)
    if note:
        st.caption(plain(note))
    st.subheader("Difference")
    if gap is not None:
        st.plotly_chart(
            gap, theme=None, key="compare difference", config=config, alt=f"difference of {alt}"
        )
    if gap_note:
        st.caption(plain(gap_note))
