"""The README and the pages tell the truth: what they name exists, and what they say runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from tests.cli.command import Command
from workbench.cli.commands import app
from workbench.discovery import load_probes
from workbench.models.names import demo_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


COMMAND_LINES = sorted(
    {
        line.split(" #")[0].strip()
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("workbench ")
    }
)
OFFLINE = [
    line
    for line in COMMAND_LINES
    if "--model" not in line or "--model demo" in line or "--model toy:" in line
]


def test_the_picture_comes_first_and_is_there():
    first = re.search(r"!\[.*?\]\((.+?)\)", README)
    assert first.start() < README.index("##")
    assert (ROOT / first[1]).stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_table_of_probes_is_complete():
    table = README.split("## Probes")[1].split("## ")[0]
    listed = re.findall(r"^\| \[([\w-]+)\]\(.+?\) \| .+ \| (\S+) \|$", table, re.MULTILINE)
    assert listed == [(probe.name, probe.paper) for probe in load_probes()]


def test_what_the_tree_names_exists():
    tree = README.split("## Tree")[1].split("```")[1]
    folders = []
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        assert (ROOT / "".join(folders)).exists(), line


def test_make_targets_exist():
    targets = set(re.findall(r"\bmake (\w+)\b", " ".join(re.findall(r"`[^`\n]+`", README))))
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= targets | {"demo", "test"} <= set(rules)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_is_one_that_exists(line):
    context = typer.main.get_command(app).make_context(
        "workbench", shlex.split(line)[1:], resilient_parsing=False
    )
    with context:
        group = context.command
        name, command, rest = group.resolve_command(context, context._protected_args + context.args)
        if hasattr(command, "commands"):
            name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, list(rest), parent=context)


def test_every_command_in_running_text_exists():
    names = set(typer.main.get_command(app).commands)
    for page in PAGES:
        for name in re.findall(r"`workbench (\w[\w-]*)", page.read_text("utf-8")):
            assert name in names, f"{page.name} names workbench {name}"


@pytest.mark.parametrize("line", OFFLINE)
def test_what_can_run_offline_runs(line, capfd, store_path, tmp_path, monkeypatch):
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    monkeypatch.chdir(tmp_path)
    command = Command(capfd)
    if line.startswith("workbench report"):
        first = "run attention-sinks --model demo --data builtin:natural --limit 2 --n-pos 32"
        command(*first.split())
    done = command(*shlex.split(line)[1:])
    assert done.code == 0, done.err


def test_the_example_probe_runs(tiny_folder):
    import workbench as wb
    from workbench.registry import _PROBES, get_probe

    names = {"__name__": "example"}
    (block,) = blocks(ROOT / "docs" / "writing_a_probe.md", "python")
    exec(compile(block, "writing_a_probe.md", "exec"), names)
    try:
        example = get_probe("norm-growth")
        tokens = torch.arange(1, 25).view(2, 12)
        found = example.measure(wb.load(str(tiny_folder)), tokens, example.config(layer=1))
        assert found.norm.shape == (2, 12)
        assert found.metrics()["mean_norm"] > 0
    finally:
        del _PROBES["norm-growth"]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "README.md", "python"):
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        assert 0 <= names["result"].metrics()["sink_rate"] <= 1
