"""What mkdocs calls while it builds the site: pages made from the code, and the navigation.

Nothing generated is kept in the repository. A page under ``docs/`` that no section of ``SECTIONS``
names still gets its place, in the last section.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("tutorial.md", "notebooks.md", "moving.md", "faq.md", "papers.md"),
    "Measure": ("probes/",),
    "Toys": ("toys/", "toy_results.md", "bigram_backcopy.md", "scan_snap.md"),
    "Edit": ("interventions.md", "interventions/"),
    "Run": (
        "sweeps.md",
        "scaling.md",
        "dashboard.md",
        "reliability.md",
        "security.md",
        "dependencies.md",
    ),
    "Reference": ("commands.md", "settings.md", "writing_a_probe.md"),
    "Evidence": ("benchmarks.md", "agreement.md", "demo_model.md", "log.md"),
}
"""Pages and folders by section, in order; those that are not there are passed over."""
REST = "More"


def generated_pages() -> dict[str, str]:
    """Path and text of every page that is made from the code."""
    from docs_tools.command_pages import command_page
    from docs_tools.registry_pages import (
        intervention_page,
        settings_page,
        toy_page,
        toy_pages_of_readme,
    )
    from workbench.discovery import load_probes, load_toys
    from workbench.interventions.files import INTERVENTIONS

    probes, toys, hand_written = load_probes(), load_toys(), toy_pages_of_readme()
    interventions = dict(sorted(INTERVENTIONS.items()))
    pages = {f"toys/{toy.name}.md": toy_page(toy, hand_written.get(toy.name)) for toy in toys}
    pages |= {
        f"interventions/{name}.md": intervention_page(name, kind)
        for name, kind in interventions.items()
    }
    pages["commands.md"] = command_page()
    pages["settings.md"] = settings_page(
        {
            "Probes": {probe.name: probe.config for probe in probes},
            "Toy tasks": {toy.name: toy.config for toy in toys},
            "Interventions": interventions,
        }
    )
    security = ROOT / "SECURITY.md"
    if security.is_file():
        pages["security.md"] = from_the_root(security.read_text(encoding="utf-8"))
    return pages


def from_the_root(text: str) -> str:
    """A page of the repository's root as one of the site; a link to a page that is not there stays text."""

    def link(found: re.Match[str]) -> str:
        words, path = found.groups()
        return f"[{words}]({path})" if (ROOT / "docs" / path).is_file() else words

    return re.sub(r"\[([^\]]+)\]\(docs/([^)]+)\)", link, text)


def with_code(path: str, text: str) -> str:
    """The page of a probe with what its code says appended."""
    found = re.fullmatch(r"probes/([\w-]+)\.md", path)
    if not found:
        return text
    from docs_tools.registry_pages import from_the_code
    from workbench.discovery import find_probe

    return f"{text}\n\n{from_the_code(find_probe(found[1]))}\n"


def navigation(paths: list[str]) -> list[Any]:
    """All pages in sections; a page that no section names comes last."""
    left = sorted(path for path in paths if path.endswith(".md") and path != "index.md")
    nav: list[Any] = [{"Home": "index.md"}]
    for section, wanted in SECTIONS.items():
        chosen = []
        for entry in wanted:
            chosen += [
                path
                for path in left
                if path == entry or (entry.endswith("/") and path.startswith(entry))
            ]
        left = [path for path in left if path not in chosen]
        if chosen:
            nav.append({section: chosen})
    return nav + ([{REST: left}] if left else [])


# mkdocs' events


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, then lay out the navigation."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Complete the pages of probes."""
    return with_code(page.file.src_uri, markdown)
