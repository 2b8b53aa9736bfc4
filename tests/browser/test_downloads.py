"""Everything that a page offers to take away, taken away by a real browser."""

import csv
import importlib.util
import io
import json

import numpy as np
import pytest

from tests.browser.conftest import CHROMIUM

pytestmark = pytest.mark.browser


@pytest.fixture
def save(tab, measured):
    """Presses a button under "Download" and returns what the browser kept."""
    page = tab.open("attention-sinks", key=measured["stock"].key)
    page.get_by_text("Download", exact=True).click()

    def press(name):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        return download.value.path().read_bytes()

    return press


def test_numbers_are_downloaded_as_they_are_stored(save, measured):
    stock = measured["stock"]
    content = json.loads(save("JSON"))
    assert content["key"] == stock.key
    score = np.array(content["arrays"]["score"], dtype=float)
    np.testing.assert_allclose(score, stock.score, atol=1e-6)
    table = stock.table()
    rows = list(csv.reader(io.StringIO(save("CSV").decode())))
    assert rows[0] == list(table)
    assert len(rows) - 1 == len(next(iter(table.values())))
    assert [int(row[rows[0].index("head")]) for row in rows[1:]] == list(table["head"])


def test_a_table_is_downloaded_as_parquet(save, measured):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_parquet(io.BytesIO(save("PARQUET")))
    pandas.testing.assert_frame_equal(frame, measured["stock"].to_dataframe())


def test_figures_and_the_notebook_are_downloaded(save, measured):
    key = measured["stock"].key
    page = save("HTML").decode()
    assert key in page
    assert "* plotly.js v" in page
    if importlib.util.find_spec("kaleido") is not None and CHROMIUM is not None:
        assert save("PNG").startswith(b"\x89PNG\r\n")
        assert save("SVG").startswith(b"<svg")
    cells = json.loads(save("Notebook (.ipynb)"))["cells"]
    source = "".join("".join(cell["source"]) for cell in cells)
    assert f"assert again.key == {key!r}" in source
