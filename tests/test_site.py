"""The documentation site builds without a warning, leads nowhere wrong and fetches nothing."""

import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs_tools.markdown import allowed, field_notes, from_docstring, settings_table
from workbench.settings import setting

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytest.importorskip("material")
navigation = pytest.importorskip("docs_tools.hook").navigation


class Page(HTMLParser):
    """What a page links to, what it fetches by itself, and the anchors it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], {"", "__skip", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(found["href"])
        elif tag in ("script", "img", "iframe") and found.get("src"):
            self.fetched.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_every_link_resolves_with_its_anchor(site, pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme in ("https", "mailto", "data"):
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.exists() or unquote(parts.fragment) not in known:
                wrong.append((path.name, link))
    assert wrong == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    remote = [item for page in pages.values() for item in page.fetched if "//" in item]
    assert remote == []
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"(?:@import|url\()\s*[\"']?https?://", style) for style in styles)


def test_probes_toys_and_interventions_have_a_page_each(site):
    from workbench.discovery import load_probes, load_toys
    from workbench.interventions.files import INTERVENTIONS

    for probe in load_probes():
        text = (site / "probes" / f"{probe.name}.html").read_text("utf-8")
        assert "Every setting" in text
        assert "What is stored" in text
    for toy in load_toys():
        assert (site / "toys" / f"{toy.name}.html").is_file()
    for name in INTERVENTIONS:
        assert (site / "interventions" / f"{name}.html").is_file()


def test_the_reference_has_every_command_and_setting(site):
    import dataclasses

    import typer

    from workbench.cli.commands import app
    from workbench.discovery import load_probes, load_toys

    commands = (site / "commands.html").read_text("utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"workbench {name}" in commands
    settings = (site / "settings.html").read_text("utf-8")
    for each in [*load_probes(), *load_toys()]:
        for field in dataclasses.fields(each.config):
            assert f"<code>{field.name}</code>" in settings, f"{each.name}: {field.name}"


def test_a_page_that_no_section_names_is_still_in_the_navigation():
    assert navigation(["index.md", "faq.md", "brand_new.md", "probes/b.md", "probes/a.md"]) == [
        {"Home": "index.md"},
        {"Start": ["faq.md"]},
        {"Measure": ["probes/a.md", "probes/b.md"]},
        {"More": ["brand_new.md"]},
    ]


def test_docstrings_become_markdown_that_says_the_same():
    text = """Score ``x`` < 1, a * b, trailing_ [batch pos].

        x = a * b

    Args:
        one: The first
            of two.
    """
    assert from_docstring(text) == (
        "Score `x` &lt; 1, a \\* b, trailing\\_ \\[batch pos].\n\n"
        "    x = a * b\n\n"
        "**Args**\n\n* `one`: The first of two."
    )


@dataclass(frozen=True)
class Example:
    """A config as an intervention has it."""

    gamma: float
    """How much | how far."""
    heads: tuple[int, ...] | None = None
    layer: int = setting(0, "which block", low=0)


def test_the_string_under_a_field_is_its_note():
    assert field_notes(Example) == {"gamma": "How much | how far."}
    assert settings_table(Example).splitlines()[2:] == [
        "| `gamma` | float | required |  | How much \\| how far. |",
        "| `heads` | tuple[int, ...] or none | none |  |  |",
        "| `layer` | int | `0` | at least 0 | which block |",
    ]


def test_what_is_allowed_is_said_in_words():
    assert allowed({"low": 0, "high": 1, "exclusive": True}) == "between 0 and 1, ends excluded"
    assert allowed({"low": 1}) == "at least 1"
    assert allowed({"low": 1, "exclusive": True}) == "above 1"
    assert allowed({"high": 2.5}) == "at most 2.5"
    assert allowed({"choices": ("a", "b")}) == "`a`, `b`"
