"""What all pages share: title, one-line errors, complaints about the URL."""

from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from app import data, url
from app.components.text import plain
from workbench.errors import WorkbenchError


@contextmanager
def page(name: str, title: str) -> Iterator[None]:
    """The frame of a page; an error that a person can mend becomes one line in it."""
    url.begin(name)
    st.title(plain(title))
    complaints = st.container()
    try:
        yield
    except WorkbenchError as error:
        st.error(plain(str(error)))
    with complaints:
        url.complain()
    url.end()
    data.warm_up()  # last: it must not keep the first page waiting
