"""The dashboard's entry point: its pages, and nothing else."""

from collections.abc import Callable

import numpy as np
import streamlit as st
from PIL import Image

from app import registry
from app.components.links import know
from app.views.compare import compare_page
from app.views.jobs import jobs_page
from app.views.overview import overview_page
from app.views.playground import playground_page
from app.views.probe import probe_page
from app.views.sweeps import sweeps_page
from app.views.training import training_page


def _probe(name: str) -> Callable[[], None]:
    return lambda: probe_page(name)


def _icon(size: int = 32, step: int = 4) -> Image.Image:
    """A causal pattern with a sink: an icon by its name would be asked of another host."""
    row, column = np.indices((size, size)) // step
    shade = np.where(column == 0, 0.0, np.where(column <= row, 0.65, 1.0))[..., None]
    return Image.fromarray((shade * 255 + (1 - shade) * np.array([68, 1, 84])).astype(np.uint8))


st.set_page_config("Interpretability workbench", _icon(), layout="wide")
pages = {
    "Workbench": [
        st.Page(overview_page, title="Overview", url_path="overview", default=True),
        st.Page(compare_page, title="Compare", url_path="compare"),
        st.Page(playground_page, title="Playground", url_path="playground"),
        st.Page(training_page, title="Toy training", url_path="training"),
        st.Page(jobs_page, title="Jobs", url_path="jobs"),
        st.Page(sweeps_page, title="Sweeps", url_path="sweeps"),
    ],
    "Probes": [
        st.Page(_probe(name), title=name.replace("-", " ").capitalize(), url_path=name)
        for name in registry.probe_names()
    ],
}
know(page for group in pages.values() for page in group)
st.navigation(pages, expanded=True).run()
