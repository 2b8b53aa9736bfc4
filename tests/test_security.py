"""The promises of SECURITY.md that can be read off the source: each would fail on one careless line."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("workbench", "probes", "toy_tasks", "app", "benchmarks")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

RUN_CODE = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "dbm",
}
"""Modules whose files run code, or hold whatever pickle holds, when they are read."""
FORBIDDEN_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.save",
        "pd.read_pickle",
    ),
    *("pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("pty.spawn", "asyncio.create_subprocess_shell", "subprocess.getoutput", "torch.hub.load"),
}
NETWORK = {
    "requests",
    "urllib",
    "http",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "telnetlib",
    "urllib3",
}
EVERYWHERE = re.compile(r"0\.0\.0\.0|(?<![\w:])::(?![\w:])|\[::\]")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def problems(source, name="x.py"):
    """What a source does that we promise not to do, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module.split(".")[0]]
        else:
            modules = []
        found += [f"{line}: imports {module}" for module in modules if module in RUN_CODE | NETWORK]
        if isinstance(node, ast.Call):
            found += [f"{line}: {what}" for what in call_problems(node)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            docstring = "\n" in node.value
            if not docstring and EVERYWHERE.search(node.value):
                found.append(f"{line}: listens to everyone: {node.value!r}")
    return [f"{name}:{text}" for text in found]


def call_problems(call):
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name.endswith((".to_pickle", ".read_pickle")):
        yield f"calls {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        yield "np.load of pickles"
    if given.get("shell", "False") != "False":
        yield "runs a shell"
    if given.get("trust_remote_code") not in (None, "False") and not given[
        "trust_remote_code"
    ].endswith("trust_remote_code"):
        yield "trusts remote code by itself"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_source_keeps_the_promises(path):
    assert problems(path.read_text("utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from joblib import load", "import shelve", "import marshal as m"),
        *(
            "import dill",
            "from cloudpickle import dumps",
            "import requests",
            "import urllib.request",
        ),
        *("torch.load('x')", "torch.load('x', weights_only=False)", "torch.save(x, 'y')"),
        *("np.load('x', allow_pickle=True)", "df.to_pickle('x')", "yaml.load(x, Loader=y)"),
        *("eval('1')", "exec('1')", "os.system('ls')", "subprocess.run('ls', shell=True)"),
        *("load('x', trust_remote_code=True)", "serve(host='0.0.0.0')", "bind('::', 80)"),
    ],
)
def test_a_line_that_breaks_a_promise_is_noticed(line):
    assert len(problems(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        *(
            "torch.load('x', weights_only=True)",
            "np.load('x')",
            "subprocess.run(['ls'])",
            "model.eval()",
        ),
        *("load('x', trust_remote_code=trust_remote_code)", "serve(host='127.0.0.1')"),
        *("re.compile('x')", "yaml.safe_load(x)", "text[::2]"),
    ],
)
def test_a_line_that_breaks_none_is_not(line):
    assert problems(line) == []


def test_the_loader_of_plans_makes_only_plain_data(tmp_path):
    from workbench.errors import ConfigError
    from workbench.execute.plan_file import read_list, read_plan

    plan = tmp_path / "plan.yaml"
    for tag in ("!!python/object/apply:os.mkdir [made]", "!!python/name:os.system ''", "!made x"):
        plan.write_text(f"models: {tag}\n")
        with pytest.raises(ConfigError, match="must be YAML"):
            read_plan(plan)
        with pytest.raises(ConfigError):
            read_list(tag)
    assert not (tmp_path / "made").exists()


def test_every_pin_stands_in_the_list_of_licences():
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "dependencies.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in asked}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names - {"interpretability-workbench"} <= pins


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for file, test in named:
        assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8"), (file, test)
