"""The page of one probe: start a run, look at a result, look at one of its heads."""

import streamlit as st

from app import data, registry
from app.components.arrays import array_of
from app.components.figures import is_head_map
from app.components.head_view import head_view
from app.components.layout import page
from app.components.result_view import choose_result, result_view
from app.components.run_form import current_job, run_form
from app.components.text import plain
from workbench.errors import WorkbenchError


def probe_page(name: str) -> None:
    """Draw the page of a probe, whoever wrote it."""
    with page(name, name.replace("-", " ").capitalize()):
        entries = data.entries_of(probe=name)
        probe = registry.probe_of(name)
        st.markdown(f"{plain(probe.summary)} {_paper(probe.paper)}")
        with st.expander("Start a run", expanded=not entries, icon=":material/play_arrow:"):
            run_form(probe)
        newest = current_job()
        if newest:
            entries = data.entries_of(probe=name)
        if not entries:
            st.info("No result of this probe is in the store yet. Start a run above.")
            return
        key = choose_result(entries, name, newest)
        clicked = result_view(key, name)
        _head(key, clicked)


def _paper(paper: str) -> str:
    kind, _, number = paper.partition(":")
    places = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    if kind not in places or not number.replace(".", "").replace("/", "").isalnum():
        return plain(paper)
    return f"[{paper}]({places[kind]}{number})"


def _head(key: str, clicked: tuple[int, int] | None) -> None:
    """Offer the heads where the result has a map of them."""
    try:
        maps = [figure for figure in data.figures_of(key).values() if is_head_map(figure)]
    except WorkbenchError:
        return
    if not maps:
        return
    heatmap = next(trace for trace in maps[0].data if trace.type == "heatmap")
    n_layers, n_heads = array_of(heatmap.z).shape
    with st.container(border=True):
        head_view(n_layers, n_heads, clicked, data.open_result(key))
