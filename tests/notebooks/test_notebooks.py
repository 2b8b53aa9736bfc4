"""The notebooks run, are committed as they ran, and keep what the first cell promises."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from workbench.models.names import demo_folder

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_CELLS = 30
MOST_BYTES = 3e6
"""Of the whole folder."""
NAMES = [
    "01_sinks",
    "02_bigram_backcopy",
    "03_successor_heads",
    "04_attack_and_reach",
    "05_act_and_zerotuning",
    "06_your_own_probe",
    "07_other_libraries",
]
PLACES = re.compile(r"(?<![\w.:/])(?:/(?:home|root|tmp|usr|opt|var|work|mnt|Users)/|[A-Z]:\\)")
"""The beginning of a path that exists on one machine."""

of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text("utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def outputs(cell):
    """Every text of a cell's outputs, by its type."""
    for output in cell["outputs"]:
        if "text" in output:
            yield "stream", "".join(output["text"])
        for kind, data in output.get("data", {}).items():
            yield kind, data if isinstance(data, str) else "".join(map(str, data))


def test_none_is_missing_and_the_readme_and_the_page_name_them_all():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    readme, page = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/notebooks.md"))
    assert "docs/notebooks.md" in readme
    for name in NAMES:
        assert f"`notebooks/{name}.ipynb`" in page


@of_each
def test_one_question_comes_first_and_something_surprises(path):
    first, *rest = read(path)["cells"]
    assert first["cell_type"] == "markdown"
    title = source(first).splitlines()[0]
    assert title.startswith(f"# {path.stem[:2]} ")
    assert title.endswith("?")
    assert source(first).count("**Question.**") == 1
    assert "**What we expect" in source(first)
    assert any("urpris" in source(cell) for cell in rest)


@of_each
def test_it_is_short_and_loops_over_layers_belong_in_a_probe(path):
    assert len(read(path)["cells"]) < MOST_CELLS
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.For | ast.comprehension):
                assert "n_layers" not in ast.unparse(node.iter), source(cell)


@of_each
def test_it_is_committed_as_it_ran_from_its_first_cell_to_its_last(path):
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]


@of_each
def test_what_says_nothing_is_not_in_it(path):
    notebook = read(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for number, cell in enumerate(notebook["cells"]):
        assert cell["metadata"] == {}
        assert cell["id"] == f"cell-{number}"
        for kind, text in outputs(cell) if cell["cell_type"] == "code" else ():
            assert kind.startswith("image/") or not PLACES.search(text), text[:300]


def test_outputs_are_small_and_figures_are_pictures():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < MOST_BYTES
    kinds = [kind for path in NOTEBOOKS for cell in code_cells(path) for kind, _ in outputs(cell)]
    assert "image/png" in kinds
    assert "application/vnd.plotly.v1+json" not in kinds


def test_the_probe_of_notebook_06_is_the_one_of_the_page():
    page = (ROOT / "docs" / "writing_a_probe.md").read_text("utf-8")
    listing, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    first, *_ = code_cells(FOLDER / "06_your_own_probe.ipynb")
    assert source(first).strip() == listing.strip()
    assert sum(bool(line.strip()) for line in listing.splitlines()) <= 30


# Running them


@pytest.fixture(scope="module")
def tool():
    """The script behind ``make notebooks``."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@of_each
def test_it_runs_and_what_it_asserts_holds(path, tool):
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    # No browser is needed: figures stay data here.
    ran = tool.executed(path, "plotly_mimetype")
    cells = [cell for cell in ran.cells if cell.cell_type == "code"]
    shown = [[output.get("data", {}) for output in cell.outputs] for cell in cells]
    # A result that ends a cell shows its card and under it its main figure.
    pairs = [pair for pair in shown if len(pair) == 2 and "text/html" in pair[0]]
    assert all("application/vnd.plotly.v1+json" in figure for _, figure in pairs)
    assert pairs or path.stem.startswith(("02", "05", "06"))
    # The same cells have the same number of outputs as in the committed file.
    assert [len(outs) for outs in shown] == [len(cell["outputs"]) for cell in code_cells(path)]
