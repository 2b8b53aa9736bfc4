"""``workbench run --revision A,B``: several checkpoints of a toy's run in one command."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from toy_tasks.model import ToyModelConfig, describe_model, make_model
from workbench.errors import ModelError
from workbench.store.results import Store

SIZES = ToyModelConfig(d_vocab=20, n_ctx=12, n_layers=2, n_heads=2, d_model=16, d_mlp=16)


@pytest.fixture
def run_folder(tmp_path):
    """A toy's run with three checkpoints of different weights."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(describe_model(SIZES)))
    for seed, step in enumerate((0, 8, 64)):
        weights = make_model(SIZES, seed).state_dict()
        save_file(weights, folder / "checkpoints" / f"step_{step:08d}.safetensors")
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def two_domains(tmp_path):
    generator = torch.Generator().manual_seed(0)
    options = []
    for name in ("first", "second"):
        tokens = torch.randint(20, (4, 10), generator=generator)
        save_file({"tokens": tokens}, tmp_path / f"{name}.safetensors")
        options += ["--data", f"{name}={tmp_path / name}.safetensors"]
    return options


def test_a_step_of_a_toy_is_a_revision(run_folder):
    first, last = (wb.load(f"toy:{run_folder}", revision=step) for step in ("0", "64"))
    end = wb.load(f"toy:{run_folder}")
    expected = make_model(SIZES, 0).state_dict()["embed.weight"]
    assert torch.equal(first.weight("W_E"), expected)
    assert torch.equal(last.weight("W_E"), end.weight("W_E"))
    assert len({first.spec.revision, last.spec.revision, end.spec.revision}) == 3
    assert first.spec.name == "run@0"


def test_a_run_that_goes_on_has_its_checkpoints_already(command, run_folder, two_domains, tmp_path):
    """What the end adds changes neither a checkpoint's identity nor the result on it."""
    running = tmp_path / "going-on" / run_folder.name
    shutil.copytree(run_folder, running, ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(ModelError, match=r"must have model\.safetensors.*or name one of its check"):
        wb.load(f"toy:{running}")
    before = wb.load(f"toy:{running}", revision="8")
    ask = ("run", "active-dormant", "--model", f"toy:{running}", *two_domains, "--revision", "8")
    first = command(*ask, "--json").json
    assert not first["cached"]
    shutil.copyfile(run_folder / "model.safetensors", running / "model.safetensors")
    assert wb.load(f"toy:{running}", revision="8").spec.revision == before.spec.revision
    again = command(*ask, "--json").json
    assert (again["cached"], again["key"]) == (True, first["key"])


@pytest.mark.parametrize("step", ["7", "main", "00000008"])
def test_a_step_that_was_not_kept_is_refused(run_folder, step):
    with pytest.raises(ModelError, match=f"got '{step}'; there are: 0, 8, 64"):
        wb.load(f"toy:{run_folder}", revision=step)


def test_every_revision_is_a_result_of_its_own(command, run_folder, two_domains, store_path):
    model = ("run", "active-dormant", "--model", f"toy:{run_folder}", *two_domains)
    found = command(*model, "--revision", "0,8,64", "--json").json
    assert [row["revision"] for row in found["revisions"]] == ["0", "8", "64"]
    assert len({row["key"] for row in found["revisions"]}) == 3
    for row in found["revisions"]:
        assert Store(store_path).get(row["key"]).metrics() == row["metrics"]
    alone = command(*model, "--revision", "8", "--json").json
    assert alone["cached"]
    assert alone["key"] == found["revisions"][1]["key"]


def test_the_page_has_the_curves_and_the_table_a_column(command, run_folder, two_domains, tmp_path):
    model = ("run", "active-dormant", "--model", f"toy:{run_folder}", *two_domains)
    page, table = tmp_path / "all.html", tmp_path / "all.csv"
    shown = command(*model, "--revision", "0, 64", "-o", page)
    assert "n_active_dormant" in shown.out
    assert "How sinks come about" in page.read_text()
    assert command(*model, "--revision", "0,64", "-o", table).code == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["revision"] for row in rows] == ["0"] * 8 + ["64"] * 8
    assert command(*model, "--revision", "0,64", "-o", tmp_path / "all.json").code == 0
    documents = json.loads((tmp_path / "all.json").read_text())
    assert [document["revision"] for document in documents] == ["0", "64"]


def test_a_probe_without_curves_has_the_pages_of_its_revisions(
    command, run_folder, two_domains, tmp_path
):
    data = two_domains[1].split("=")[1]
    model = ("run", "attention-sinks", "--model", f"toy:{run_folder}", "--data", data)
    page = tmp_path / "all.html"
    assert command(*model, "--revision", "0,64", "-o", page).code == 0
    text = page.read_text()
    assert text.count("<h2>revision ") == 2
    assert text.count("plotly.js v") == 1  # its JavaScript once


def test_what_cannot_be_is_refused_in_one_line(command, run_folder, two_domains, tiny_folder):
    toy = ("run", "active-dormant", "--model", f"toy:{run_folder}", *two_domains)
    command(*toy, "--revision", "0,0").failed_with("different ones", "'0,0'")
    command(*toy, "--revision", "0,").failed_with("different ones")
    command(*toy, "--revision", "0,7").failed_with("got '7'", "there are: 0, 8, 64")
    command(*toy, "--revision", "0,8", "-o", "x.png").failed_with("png")
    command(*toy, "--revision", "0,8", "--set", "fdrr=1").failed_with("fdrr", "'fdr'")
    folder = ("run", "active-dormant", "--model", tiny_folder, *two_domains)
    command(*folder, "--revision", "a,b").failed_with("one revision", "each folder")
