"""A field for a longer text, in the URL as far as that takes it."""

import streamlit as st

from app import url

IN_URL = 1000
"""Characters that the URL takes; a longer text is not shared with it, and that is said."""


def url_text_area(name: str, label: str, default: str, key: str, height: int = 100) -> str:
    """A text that a person writes.

    Args:
        name: Of the parameter in the URL.
        label: Over the field.
        default: What stands there first.
        key: Of the widget.
        height: In pixels.
    """
    url.seed(name, str, default, key)
    text = st.text_area(label, key=key, height=height)
    if len(text) > IN_URL:
        st.caption(
            f"The {label.lower()} is longer than {IN_URL} characters and is not part of the URL."
        )
        url.keep(name, default, default)
    else:
        url.keep(name, text, default)
    return str(text)
