"""Links from one page of the dashboard to another, with what is selected there."""

from collections.abc import Iterable, Mapping
from typing import Any

import streamlit as st

from app.components.text import plain


def know(pages: Iterable[Any]) -> None:
    """Note the pages of this run, so that they can be linked to by their path."""
    st.session_state["pages"] = {page.url_path or "overview": page for page in pages}


def page_link(path: str, label: str, icon: str, query: Mapping[str, str]) -> None:
    """A link to a page by its path; nothing where the page does not exist."""
    page = st.session_state.get("pages", {}).get(path)
    if page is None:
        st.caption(plain(f"There is no page for {path}: its probe is not installed."))
        return
    st.page_link(page, label=plain(label), icon=f":material/{icon}:", query_params=dict(query))
