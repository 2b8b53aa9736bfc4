"""A store for the pages to show, and caches that know nothing of the test before."""

import pytest


@pytest.fixture
def fresh_caches(store_path):
    import streamlit as st

    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


@pytest.fixture
def full(store_path):
    from tests.app.opening import EVIL, keep

    return [keep(store_path, name) for name in ("one", "two", EVIL)]
