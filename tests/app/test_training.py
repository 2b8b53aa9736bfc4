"""The page of a training that still runs: curves with theory, pattern, checkpoints."""

import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

from safetensors.torch import load_file

import workbench as wb
from app import jobs
from app.components.arrays import array_of
from tests.app.opening import open_page, told
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, train_bigram_backcopy
from workbench.models.base import Site
from workbench.processes import birth_of

JOB, FOLDER = "0123456789abcdef0000", "0123456789abcdef"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / FOLDER
    config = BigramBackcopyConfig(steps=8, n_held_out=8, n_pos=16, n_layers=1)
    train_bigram_backcopy(config, folder)
    return folder


@pytest.fixture
def running(store_path, trained):
    """A job of this process, whose folder is that of a run; what only the end writes is not there."""
    folder = jobs.jobs_folder(store_path) / JOB
    folder.mkdir(parents=True)
    asked = {"kind": "train", "name": "bigram-backcopy", "about": {"folder": FOLDER}}
    (folder / "request.json").write_text(json.dumps(asked))
    now = {"pid": os.getpid(), "birth": birth_of(os.getpid())}
    (folder / "status.json").write_text(json.dumps(now))
    (folder / "log").write_text("step 4/8  loss 1.2\n")
    place = store_path / "training" / FOLDER
    place.mkdir(parents=True)
    for path in trained.rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            target = place / path.relative_to(trained)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return place


def charts(tab):
    assert not tab.exception
    return [json.loads(chart.proto.spec) for chart in tab.get("plotly_chart")]


def test_a_training_is_watched_with_its_theory_and_gone_back_through(running):
    tab = open_page("training", curves="sink_logit_gap,backcopy_risk")
    assert "n = 1 run, " in told(tab)
    assert "Dashed in sink_logit_gap: theory: 1/2 ln t + c." in told(tab)
    curves, newest = charts(tab)
    lines = {line["name"]: line for line in curves["data"]}
    gap, grown = lines["sink_logit_gap"], lines["sink_logit_gap, theory: 1/2 ln t + c"]
    steps = array_of(grown["x"])
    assert list(array_of(gap["x"])) == [0, *steps]
    # Between any two steps the law grows by half the logarithm of their ratio.
    np.testing.assert_allclose(np.diff(array_of(grown["y"])), np.diff(0.5 * np.log(steps)))
    assert set(array_of(lines["backcopy_risk, theory: the oracle"]["y"])) == {0}
    # The newest checkpoint is followed until a person goes back to the first.
    assert tab.select_slider[0].value == 8
    next(box for box in tab.toggle if "Follow" in box.label).set_value(False).run()
    tab.select_slider[0].set_value(0).run()
    assert dict(tab.query_params)["step"] == "0"
    assert "Attention at step 0 on the first held-out sequence" in told(tab)
    first = charts(tab)[1]
    pattern = np.nan_to_num(array_of(first["data"][0]["z"]))
    assert np.abs(pattern - np.nan_to_num(array_of(newest["data"][0]["z"]))).max() > 0
    model = wb.load(f"toy:{running}", revision="0")
    tokens = load_file(running / "sample.safetensors")["tokens"][:1]
    whole = model.capture(tokens, [Site("pattern", 0)])[Site("pattern", 0)][0, 0]
    np.testing.assert_allclose(pattern, whole.numpy(), atol=1e-5)


def test_a_run_without_sequences_shows_its_pattern_on_random_tokens(running):
    (running / "sample.safetensors").unlink()
    assert "on random tokens (the run has no sample" in told(open_page("training"))


def test_a_half_written_line_of_a_log_is_left_out(running):
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss"')
    assert len(charts(open_page("training"))) == 2
