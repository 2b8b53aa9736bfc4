"""Pictures of a figure, drawn by a real Chromium: what kaleido makes of PNG and SVG."""

import importlib.util
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.app.opening import keep
from tests.browser.conftest import missing
from workbench.store.results import Store

pytestmark = pytest.mark.browser

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    if importlib.util.find_spec("kaleido") is None:
        pytest.skip("needs kaleido (extra images)")
    folder = tmp_path_factory.mktemp("store")
    return Store(folder).get(keep(folder))


def test_a_png_shows_the_figure(result, tmp_path):
    from PIL import Image

    result.save(tmp_path / "figure.png")
    picture = Image.open(tmp_path / "figure.png")
    figure = next(iter(result.figures().values()))
    assert picture.format == "PNG"
    assert picture.size == (700, figure.layout.height)
    # Viridis from end to end lies in the map: dark violet where no head sinks, yellow where all do.
    seen = np.asarray(picture.convert("RGBA"))[..., :3].reshape(-1, 3).astype(int)
    for colour in ((68, 1, 84), (253, 231, 37)):
        assert np.abs(seen - colour).sum(axis=1).min() < 12, colour


def test_an_svg_holds_the_texts_of_the_figure_and_loads_nothing(result, tmp_path):
    result.save(tmp_path / "figure.svg")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert root.tag == f"{SVG}svg"
    said = " ".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))
    for words in ("head (index)", "layer (index)", "n = 2 prompts"):
        assert words in said
    addresses = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.endswith("href") and not value.startswith(("#", "data:"))
    ]
    assert addresses == []
