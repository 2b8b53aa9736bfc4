"""The blocks of the README and the pages, and what runs them: each page in order, in one process.

A fenced block of ``sh`` or ``python`` is run. One that cannot be has the reason right above it:

    <!-- not run: needs a network -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.cli.main import run_command_line
from workbench.registry import _PROBES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = (
    "docs/bigram_backcopy.md",
    "docs/scan_snap.md",
    "docs/probes/activation-attacks.md",
    "docs/probes/reachability.md",
    "docs/probes/successor-heads.md",
)
"""Pages whose blocks take many seconds: ``tests/slow/test_docs.py`` runs them."""

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run."""

    @property
    def name(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    """A page as it is written from the root."""
    return page.relative_to(ROOT).as_posix()


def commands(block: Block) -> list[str]:
    """The lines of a block of shell, continued lines joined, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def run_page(page: Path, capfd: Any) -> int:
    """Run what can be run of a page, in the current folder; returns how many blocks that were."""
    names: dict[str, Any] = {"__name__": "page"}
    n_run = 0
    try:
        for block in blocks(page):
            if block.reason is not None or block.language not in ("sh", "python"):
                continue
            n_run += 1
            if block.language == "python":
                exec(compile(block.text, block.name, "exec"), names)
                continue
            for line in commands(block):
                program, *arguments = shlex.split(line)
                assert program == "workbench", f"{block.name}: {line}: mark it as not run, and why"
                capfd.readouterr()
                code = run_command_line(arguments)
                assert code == 0, f"{block.name}: {line}: {capfd.readouterr().err}"
    finally:
        # The page on writing a probe registers one.
        for name in [name for name, probe in _PROBES.items() if probe.measure.__module__ == "page"]:
            del _PROBES[name]
    return n_run
