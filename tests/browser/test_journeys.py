"""What a person does, from the first click to the number: six journeys in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest

from app import jobs
from workbench.processes import birth_of
from workbench.store.results import Store

GRAPH = ".js-plotly-plot"

CELL = """([index, x, y]) => {
    const graph = document.querySelectorAll(".js-plotly-plot")[index];
    const { xaxis, yaxis } = graph._fullLayout;
    const box = graph.getBoundingClientRect();
    return [box.left + xaxis._offset + xaxis.l2p(x), box.top + yaxis._offset + yaxis.l2p(y)];
}"""
"""Where a point of a figure's axes lies on the screen."""

NUMBERS = """([index, trace]) => {
    const values = document.querySelectorAll(".js-plotly-plot")[index]._fullData[trace].z;
    return Array.from(values, row => Array.from(row));
}"""
"""The numbers that a drawn map shows."""

pytestmark = pytest.mark.browser


@pytest.fixture
def empty_store(server):
    """The server's store as it is on the first day; what was in it comes back afterwards."""
    aside = server.store.with_name("aside")
    if server.store.exists():
        server.store.rename(aside)
    yield Store(server.store)
    if aside.exists():
        for path in aside.rglob("*"):  # beside what the test has left
            target = server.store / path.relative_to(aside)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
        shutil.rmtree(aside)


def click_cell(tab, index, x, y):
    graph = tab.page.locator(GRAPH).nth(index)
    graph.locator(".scatterlayer .point").first.wait_for(state="attached")
    graph.scroll_into_view_if_needed()
    tab.page.mouse.click(*tab.page.evaluate(CELL, [index, x, y]))


def test_first_run_from_the_overview(tab, empty_store, expect):
    page = tab.open()
    expect(page.get_by_text("Nothing has been measured yet")).to_be_visible()
    tab.shoot("first")
    tab.choose("Probe", "attention-sinks")
    page.get_by_role("link", name="Start attention-sinks").click()
    expect(page.get_by_role("heading", name="Attention sinks")).to_be_visible()
    page.get_by_role("spinbutton", name="Tokens a prompt").fill("32")
    at_most = page.get_by_role("spinbutton", name="Prompts at most")
    at_most.fill("2")
    at_most.press("Enter")
    page.wait_for_url(lambda url: "limit=2" in url and "n_pos=32" in url)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("running").first).to_be_visible()
    expect(page.get_by_test_id("stMetric").first).to_be_visible()
    (entry,) = empty_store.list()
    shown = page.get_by_test_id("stMetric").first
    assert "sink rate" in shown.inner_text()
    assert f"{entry.metrics['sink_rate']:.4g}" in shown.inner_text()
    assert (entry.metrics["n_prompts"], entry.metrics["n_pos"]) == (2, 32)
    tab.shoot("probe")
    tab.open()
    expect(page.get_by_text("1 result of 1 model")).to_be_visible()
    tab.shoot("overview")


def test_a_click_on_a_head_shows_that_head(tab, measured, expect):
    page = tab.open("attention-sinks", key=measured["stock"].key)
    click_cell(tab, 0, 2, 1)
    expect(page.get_by_role("heading", name="Head L1H2")).to_be_visible()
    page.wait_for_url(lambda url: "head=L1H2" in url)
    page.get_by_text("Show its pattern").click()
    expect(page.locator(GRAPH)).to_have_count(2)
    pattern = np.array(page.evaluate(NUMBERS, [1, 0]), dtype=float)
    assert pattern.shape[0] == pattern.shape[1] > 10
    np.testing.assert_allclose(np.nansum(pattern, axis=1), 1.0, atol=1e-4)
    tab.shoot("head")
    page.reload()
    tab.settle()
    expect(page.get_by_role("heading", name="Head L1H2")).to_be_visible()
    expect(page.locator(GRAPH)).to_have_count(2)


def test_stock_and_edited_are_compared_on_the_same_axes(tab, measured, expect):
    stock, edited = measured["stock"], measured["edited"]
    page = tab.open("compare", keys=f"{stock.key[:12]},{edited.key[:12]}")
    expect(page.get_by_role("heading", name="Difference")).to_be_visible()
    expect(page.locator(GRAPH)).to_have_count(2)
    gap = np.array(page.evaluate(NUMBERS, [1, 0]), dtype=float)
    expected = (edited.score - stock.score).mean(dim=0)[..., 0].numpy()
    np.testing.assert_allclose(gap, expected, atol=1e-4)
    assert gap[0, 1] == gap[0].max() > 0
    tab.shoot("compare")
    page.get_by_role("button", name="Remove").first.click()
    expect(page.get_by_text("Choose 2 to 6 results")).to_be_visible()


def test_an_edit_in_the_playground_is_seen_and_saved(tab, measured, expect, tmp_path):
    page = tab.open("playground", tokens="3")
    slider = page.get_by_role("slider", name="gamma")
    slider.press("ArrowRight")
    page.wait_for_url(lambda url: "gamma=1.55" in url)
    click_cell(tab, 0, 1, 0)
    page.wait_for_url(lambda url: "heads=L0H1" in url)
    page.get_by_role("button", name="Generate both").click()
    expect(page.get_by_role("heading", name="Where attention moved")).to_be_visible()
    said = page.get_by_test_id("stCode")
    expect(said).to_have_count(2)
    for index in range(2):  # the words of a text are drawn after its frame
        expect(said.nth(index)).to_contain_text(re.compile(r"\w"))
    # The grid of heads, the attention to the first token, and then where it moved.
    expect(page.locator(GRAPH)).to_have_count(4)
    moved = np.array(page.evaluate(NUMBERS, [2, 0]), dtype=float)
    assert moved[0, 1] > 0
    assert moved[0, [0, 2, 3]].max() == 0
    tab.shoot("playground")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as an intervention file").click()
    download.value.save_as(tmp_path / "edit.json")
    saved = json.loads((tmp_path / "edit.json").read_text())
    assert (saved["name"], saved["gamma"], saved["heads"]) == ("zerotuning", 1.55, [[0, 1]])


@pytest.fixture
def long_training(server, tab, expect):
    """A training of many minutes, started from its page."""
    trained = [job for job in jobs.listing(server.store) if job.request.kind == "train"]
    # Equal settings would go on in the folder of an earlier test's training.
    seed = str(len(trained))
    page = tab.open("training", **{"s.steps": "1000000", "s.d_model": "16", "s.seed": seed})
    if trained:  # the form is open only before the first one
        page.get_by_text("Start a training").click()
    page.get_by_role("button", name="Train").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    (job,) = (job for job in jobs.listing(server.store) if job.is_running)
    yield job.id
    found = jobs.read(server.store, job.id)
    if found.is_running:
        jobs.cancel(found, grace=0.0)


def test_a_job_survives_a_reload_and_is_found_by_another_tab(
    server, tab, open_tab, long_training, expect
):
    page = tab.page
    expect(page.get_by_text("running", exact=True).first).to_be_visible()
    page.reload()
    tab.settle()
    expect(page.get_by_text("running", exact=True).first).to_be_visible()
    assert f"job={long_training}" in page.url
    # After a colon stands an invisible character, which keeps it from being read as markup.
    expect(page.get_by_text("Dashed in sink_logit_gap")).to_be_visible()
    tab.shoot("training")
    page.context.close()
    other = open_tab()
    seen = other.open("jobs")
    expect(seen.get_by_text("bigram-backcopy", exact=True).first).to_be_visible()
    expect(seen.get_by_text("running", exact=True).first).to_be_visible()
    expect(seen.get_by_role("button", name="Cancel")).to_be_visible()
    other.shoot("jobs")
    assert jobs.read(server.store, long_training).is_running


def test_a_job_is_cancelled_from_its_page(server, tab, open_tab, long_training, expect):
    page = open_tab().open("jobs", job=long_training)
    status = server.store / "jobs" / long_training / "status.json"
    expect(page.get_by_text("running", exact=True).first).to_be_visible()
    pid = json.loads(status.read_text())["pid"]
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("finished parts are kept")).to_be_visible()
    assert jobs.read(server.store, long_training).state == "cancelled"
    assert birth_of(pid) is None
    # The tab that started it sees the end without a reload.
    expect(tab.page.get_by_text("cancelled", exact=True).first).to_be_visible()


PLAN = """\
models: [demo]
probes: {attention-sinks: {threshold: [0.2, 0.4]}}
data: "builtin:natural"
n_pos: 16
limit: 2
seeds: [0, 1]
"""


def test_a_sweep_is_started_and_watched_from_its_page(server, tab, expect):
    page = tab.open("sweeps", plan=PLAN)
    form = page.locator("details").filter(has_text="Start a sweep")
    if form.get_attribute("open") is None:  # it is open only before the first one
        form.locator("summary").click()
    page.get_by_role("button", name="Start the sweep").click()
    expect(page.get_by_text("complete", exact=True).first).to_be_visible()
    expect(page.get_by_text("4 of 4 cells")).to_be_visible()
    page.wait_for_url(lambda url: "sweep=" in url)
    found = Store(server.store).list()
    assert sum(entry.metrics.get("n_pos") == 16 for entry in found) >= 2
    tab.shoot("sweeps")
