"""The README and the pages tell the truth: what they name exists, and what they say runs."""

import re
import shlex

import pytest
import typer

from tests.pages import PAGES, ROOT, SLOW, blocks, commands, name_of, run_page
from workbench.cli.commands import app
from workbench.cli.train import TOYS
from workbench.discovery import load_probes
from workbench.interventions.files import INTERVENTIONS
from workbench.models.names import demo_folder

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:workbench|python|pip|make|git|cd|sbatch) |^import \w|^from \w[\w.]* import ",
    re.MULTILINE,
)
"""A line that somebody would run."""
COMMAND_LINES = sorted(
    {
        line
        for block in BLOCKS
        if block.language == "sh"
        for line in commands(block)
        if line.startswith("workbench ") and "--help" not in line
    }
)


def test_the_picture_comes_first_and_is_there():
    first = re.search(r"!\[.*?\]\((.+?)\)", README)
    assert first.start() < README.index("##")
    assert (ROOT / first[1]).stat().st_size > 1000


@pytest.fixture(scope="module")
def made():
    """Pages that the site has and the folder has not."""
    pytest.importorskip("mkdocs")
    from docs_tools.hook import generated_pages

    return {(ROOT / "docs" / path) for path in generated_pages()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page, made):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text("utf-8")):
        place = (page.parent / target).resolve()
        assert "://" in target or place.exists() or place in made, target


def test_the_table_of_probes_is_complete():
    table = README.split("## Probes")[1].split("## ")[0]
    listed = re.findall(r"^\| \[([\w-]+)\]\(.+?\) \| .+ \| (\S+) \|$", table, re.MULTILINE)
    assert listed == [(probe.name, probe.paper) for probe in load_probes()]


def test_the_guide_reads_all_eleven_papers_and_every_one_that_something_is_of():
    guide = (ROOT / "docs" / "papers.md").read_text("utf-8").split("\n## ")[1:]
    read = [re.search(r"arXiv:\d{4}\.\d{5}", section)[0] for section in guide]
    assert len(read) == len(set(read)) == 11
    sources = [
        path.read_text("utf-8")
        for folder in ("probes", "toy_tasks", "workbench/interventions")
        for path in (ROOT / folder).glob("*.py")
    ]
    named = {each for text in sources for each in re.findall(r'paper="(arXiv:[\d.]+)"', text)}
    assert len(named) > 7
    assert named <= set(read)


def test_the_tables_of_toys_and_interventions_are_complete():
    for title, names in (("Toy tasks", TOYS), ("Interventions", INTERVENTIONS)):
        table = README.split(f"## {title}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^\| (?:\[|`)([\w-]+)(?:\]|`)", table, re.MULTILINE)
        assert sorted(listed) == sorted(names), title


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


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_that_is_not_run_says_why(block):
    if block.reason is not None:
        assert len(block.reason) > 8, f"{block.name}: the reason must be said"
    if block.language not in ("sh", "python"):
        assert not COMMAND.search(block.text), (
            f"{block.name}: mark the fence as sh or python, so that it is run"
        )


def test_few_blocks_are_left_out():
    left = [block.name for block in BLOCKS if block.reason is not None]
    run = [block for block in BLOCKS if block.language in ("sh", "python") and not block.reason]
    assert len(left) < len(run), left


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_mark_is_lost_and_no_command_hides_in_an_indented_block(page):
    text = page.read_text("utf-8")
    marked = [block for block in BLOCKS if block.page == page and block.reason is not None]
    assert text.count("<!-- not run: ") == len(marked), "a mark stands right above its fence"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = "\n".join(re.findall(r"^    (.*)$", outside, re.MULTILINE))
    assert not COMMAND.search(indented)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """One store for all pages: what two pages measure alike is measured once."""
    return tmp_path_factory.mktemp("docs") / "store"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if name_of(page) not in SLOW],
    ids=name_of,
)
def test_the_blocks_of_a_page_run(page, capfd, shared_store, tmp_path, monkeypatch):
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    monkeypatch.setenv("WORKBENCH_HOME", str(shared_store))
    monkeypatch.chdir(tmp_path)
    runnable = [b for b in blocks(page) if b.language in ("sh", "python") and b.reason is None]
    assert run_page(page, capfd) == len(runnable)


def test_slow_pages_exist():
    assert set(SLOW) <= {name_of(page) for page in PAGES}


def test_the_probe_in_the_page_has_thirty_lines():
    page = ROOT / "docs" / "writing_a_probe.md"
    first = next(block for block in blocks(page) if block.language == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_a_page_names_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text("utf-8")):
        text = (ROOT / path).read_text("utf-8")
        assert not name or f"def {name}(" in text, f"{path}::{name}"
