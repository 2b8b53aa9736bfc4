"""Imports point one way, each library stays in its files, and nothing is ever pickled."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.discovery import load_probes

ROOT = Path(__file__).parents[1]
PACKAGES = ("workbench", "probes", "toy_tasks", "app")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

HOMES = {
    "streamlit": ("app/",),
    "plotly": ("app/", "probes/figures/"),
    # The demo model's trainer makes a model and a tokenizer in transformers' own format.
    "transformers": ("workbench/models/", "workbench/attention/", "toy_tasks/language_"),
    "transformer_lens": ("workbench/models/bridge_building.py",),
    "nnsight": ("workbench/models/nnsight_building.py", "workbench/models/nnsight_remote.py"),
    "datasets": ("workbench/files.py",),
    "diffusers": ("workbench/models/diffusion.py",),
    "pandas": ("workbench/result.py", "app/"),
    "ray": ("workbench/execute/ray.py",),
    "submitit": ("workbench/execute/slurm.py",),
    "triton": (
        "workbench/attention/column_kernel.py",
        "workbench/attention/column_kernel_triton.py",
    ),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "joblib": (),
}
"""Where a library may be imported."""

MAY_IMPORT = {
    "workbench": set(),
    "workbench/cli": {"probes", "toy_tasks", "app"},
    "probes": {"workbench"},
    "probes/figures": {"workbench", "probes", "toy_tasks"},
    "toy_tasks": {"workbench"},
    "app": {"workbench", "probes", "toy_tasks"},
}
"""Which of our packages a package may import besides itself."""

LIGHT = ("workbench", "workbench.cli.commands", "workbench.run", "workbench.store.results")
"""Modules whose import must leave torch alone."""


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """Every imported module with its line, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


def package_of(name):
    inner = "/".join(name.split("/")[:2])
    return inner if inner in MAY_IMPORT else name.split("/")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down_and_libraries_stay_at_home(path):
    name, tree = name_of(path), ast.parse(path.read_text(encoding="utf-8"))
    own = package_of(name)
    wrong = []
    for module, line in imports(tree):
        top = module.split(".")[0]
        if top in PACKAGES and top != own.split("/")[0] and top not in MAY_IMPORT[own]:
            wrong.append(f"{name}:{line} imports {module}")
        if top in HOMES and not name.startswith(HOMES[top] or ("nowhere",)):
            wrong.append(f"{name}:{line} imports {module}; only {HOMES[top] or 'nothing'} may")
    assert wrong == []


def is_part_of_the_same_toy(module, own):
    """A toy or probe too large for one file has several that begin alike: ``scan_snap_data``."""
    parts = (
        "toy_tasks.training",
        "toy_tasks.model",
        "toy_tasks.bigram_",
        "toy_tasks.language_",
        "toy_tasks.scan_snap",
        "probes.successor_heads",
    )
    return any(module.startswith(part) and own.startswith(part) for part in parts)


def is_part_of_the_same_probe(module, own):
    """The parts of a probe begin with its module's name: ``active_dormant_ablation``."""
    probes = {f"probes.{probe.topic}_" for probe in load_probes()}
    return any((module + "_").startswith(name) and (own + "_").startswith(name) for name in probes)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_probes_and_toys_never_import_each_other(path):
    name = name_of(path)
    if not name.startswith(("probes/", "toy_tasks/")) or name.startswith("probes/figures/"):
        return
    own = name.removesuffix(".py").replace("/", ".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    shared = {"toy_tasks.training", "toy_tasks.model"}
    siblings = {
        module
        for module, _ in imports(tree)
        if module.split(".")[0] in ("probes", "toy_tasks")
        and module not in {own, *shared}
        and not is_part_of_the_same_toy(module, own)
        and not is_part_of_the_same_probe(module, own)
    }
    assert siblings == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_pickled(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        call, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        assert call != "torch.save", f"{name_of(path)}:{node.lineno}"
        if call == "torch.load":
            assert ast.unparse(given["weights_only"]) == "True", f"{name_of(path)}:{node.lineno}"
        if call.endswith("np.load"):
            assert "allow_pickle" not in given, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_empty(package):
    for path in (ROOT / package).rglob("__init__.py"):
        if name_of(path) != "workbench/__init__.py":
            assert path.read_text(encoding="utf-8") == "", name_of(path)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_leaves_torch_alone(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
