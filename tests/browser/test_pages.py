"""Every page in a real browser: narrow, by keyboard, with wrong addresses and hostile texts."""

from urllib.parse import parse_qs, urlsplit

import pytest

from app import registry
from tests.app.opening import EVIL, OWN, keep

PAGES = (*OWN, *registry.probe_names())

OVERFLOW = """() => {
    const main = document.querySelector("[data-testid=stMain]");
    return Math.max(
        document.documentElement.scrollWidth - window.innerWidth, main.scrollWidth - main.clientWidth
    );
}"""

FOCUSED = """() => {
    const at = document.activeElement;
    const label = at.getAttribute("aria-label") || at.innerText || at.getAttribute("placeholder") || "";
    return [at.tagName.toLowerCase(), label.trim().split("\\n").join(" ")];
}"""

pytestmark = pytest.mark.browser


@pytest.fixture
def hostile(server, measured):
    """A result whose model is called by a piece of markup."""
    return keep(server.store, EVIL)


def test_no_page_is_wider_than_a_phone(open_tab, measured, expect):
    tab = open_tab(color_scheme="dark")
    tab.page.set_viewport_size({"width": 400, "height": 800})
    for name in PAGES:
        page = tab.open("" if name == "overview" else name)
        assert page.evaluate(OVERFLOW) <= 0, name
        expect(page.get_by_test_id("stException")).to_have_count(0)
        if name == "attention-sinks":
            tab.shoot("narrow")


def test_a_wrong_address_says_so_and_shows_the_default(tab, measured, expect):
    page = tab.open("attention-sinks", figure="no-such", head="L99H0")
    expect(page.get_by_text("no figure is called 'no-such'")).to_be_visible()
    expect(page.get_by_text("no head is called 'L99H0'")).to_be_visible()
    expect(page.get_by_test_id("stMetric").first).to_be_visible()
    tab.choose("Figure", "score by position")
    expect(page.get_by_text("no figure is called")).to_have_count(0)


def test_a_click_on_an_empty_cell_of_the_overview_leads_to_its_start(tab, measured, expect):
    page = tab.open()
    grid = page.get_by_test_id("stDataFrame").first.locator("canvas").first
    expect(grid).to_be_visible()
    box = grid.bounding_box()
    # The first row is demo; of the last column that is seen nothing has been run.
    page.mouse.click(box["x"] + box["width"] - 60, box["y"] + 35 + 17)
    page.wait_for_url(lambda url: "probe=" in url)
    (chosen,) = parse_qs(urlsplit(page.url).query)["probe"]
    expect(page.get_by_role("combobox", name="Probe")).to_have_value(chosen)
    expect(page.get_by_text(f"{chosen} has not been run on demo")).to_be_visible()
    page.get_by_role("link", name=f"Start {chosen}").click()
    title = chosen.replace("-", " ").capitalize()
    expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_visible()


def test_markup_in_texts_of_others_stays_text(tab, hostile, expect):
    dialogs = []
    tab.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for path, query in (
        ("", {"model": EVIL}),
        ("attention-sinks", {"key": hostile, "prompt": EVIL, "pattern": "yes", "on": "demo"}),
        ("attention-sinks", {"figure": EVIL, "model": EVIL}),
        ("playground", {"prompt": EVIL, "tokens": "2"}),
        ("compare", {"keys": EVIL}),
    ):
        page = tab.open(path, **query)
        if path == "playground":
            page.get_by_role("button", name="Generate both").click()
            expect(page.get_by_role("heading", name="Where attention moved")).to_be_visible()
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("a[href*='b.example']").count() == 0
        if path == "attention-sinks" and "pattern" in query:
            expect(page.locator(".js-plotly-plot")).to_have_count(2)
            expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value(EVIL)
    assert dialogs == []


def tab_through(page, most=60):
    """What the Tab key reaches, in order."""
    seen = []
    for _ in range(most):
        page.keyboard.press("Tab")
        seen.append(tuple(page.evaluate(FOCUSED)))
    return seen


def test_the_keyboard_reaches_the_main_controls(open_tab, measured, expect):
    tab = open_tab(color_scheme="dark")
    page = tab.open(model="demo", probe="attention-sinks")  # others' results may be newer
    expect(page.get_by_role("combobox", name="Probe")).to_be_visible()
    reached = tab_through(page, 50)
    links = {("a", name) for name in ("Overview", "Compare", "Playground", "Attention sinks")}
    assert links | {("input", "Model"), ("input", "Probe")} <= set(reached)
    # On its way the Tab key walks through the matrix, and the last cell that it chose stays chosen.
    assert f"probe={registry.probe_names()[-1]}" in page.url
    tab.choose("Probe", "attention-sinks")
    link = page.get_by_role("link", name="Open the newest result")
    link.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("stMetric").first).to_be_visible()
    tab.settle()
    names = [name for _, name in tab_through(page, 60)]
    for control in ("Figure", "Start a run", "Show its pattern"):
        assert any(control in name for name in names), (control, names)
    tab.shoot("dark")
