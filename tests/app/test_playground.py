"""The playground: both continuations, steering from files, calibrations loaded and saved."""

import json

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import torch
from safetensors.torch import save_file

import workbench as wb
from app.components.both_models import sink_mass_figure
from app.views.playground import file_text
from tests.app.opening import button, needs_demo, open_page, told
from workbench.generation import compare_generation
from workbench.interventions.files import from_content
from workbench.interventions.mean_heads import MeanHeads
from workbench.interventions.zerotuning import ZeroTuning

pytestmark = pytest.mark.usefixtures("fresh_caches")


@needs_demo
def test_the_playground_writes_both_continuations():
    tab = open_page("playground", tokens="4", gamma="0.05")
    button(tab, "Generate both").click().run()
    assert not tab.exception
    assert not tab.error
    assert len(tab.code) == 2
    assert all(shown.value.strip() for shown in tab.code)
    rows = tab.dataframe[0].value
    assert len(rows) == 4
    assert (rows["p stock"].astype(float) > 0).all()
    # Every token under both models, and the attention to the first token, as ``--compare`` gives them.
    wanted = compare_generation(
        wb.load("demo"), tab.text_area[0].value, wb.ZeroTuning(0.05), max_new_tokens=4
    )
    for table, path in zip(tab.dataframe[1:3], (wanted.stock, wanted.edited), strict=True):
        for name, values in (
            ("p stock", path.probability_stock),
            ("p change", path.probability_edited - path.probability_stock),
            ("entropy edited", path.entropy_edited),
            ("entropy change", path.entropy_edited - path.entropy_stock),
        ):
            shown = table.value[name].astype(float)
            np.testing.assert_allclose(shown, values, atol=6e-4)
    masses = tab.session_state["play found"][-1]
    np.testing.assert_allclose(masses[0], wanted.sink_mass_stock, atol=1e-6)
    np.testing.assert_allclose(masses[1], wanted.sink_mass_edited, atol=1e-6)
    figure = sink_mass_figure(*(mass.numpy() for mass in masses))
    assert [list(bar.y) for bar in figure.data] == [mass.tolist() for mass in masses]
    charts = [json.loads(chart.proto.spec) for chart in tab.get("plotly_chart")]
    assert any("attention to the first token (share)" in json.dumps(chart) for chart in charts)


@needs_demo
def test_the_playground_takes_a_steering_vector_from_a_file(tmp_path):
    tab = open_page("playground", intervention="add-vector", tokens="2")
    assert "add-vector needs vector" in told(tab)
    boxes = {box.label: box for box in [*tab.selectbox, *tab.text_input, *tab.number_input]}
    assert boxes["site"].value == "L2.resid_post"
    assert boxes["scale"].value == 1.0
    file, vector = tmp_path / "v.safetensors", torch.linspace(-1.0, 1.0, 128)
    save_file({"vector": vector}, file)
    boxes["site"].set_value("L1.resid_pre")
    boxes["scale"].set_value(3.0)
    boxes["vector (a file)"].set_value(str(file)).run()
    button(tab, "Generate both").click().run()
    assert not tab.exception
    assert not tab.error
    (stock, edited), *_ = tab.session_state["play found"]
    model, prompt = wb.load("demo"), tab.text_area[0].value
    with model.edit(wb.AddVector("L1.resid_pre", vector, 3.0)):
        assert edited.text == model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert edited.probability[0] != stock.probability[0]
    assert dict(tab.query_params)["site"] == "L1.resid_pre"
    again = open_page("playground", **dict(tab.query_params))
    assert next(box.value for box in again.number_input if box.label == "scale") == 3.0
    boxes["vector (a file)"].set_value(str(tmp_path / "no.safetensors")).run()
    button(tab, "Generate both").click().run()
    assert "no.safetensors: no such file" in told(tab)


@needs_demo
def test_the_playground_takes_means_of_heads_from_a_file(tmp_path):
    file = tmp_path / "m.safetensors"
    save_file({"mean": torch.ones(2, 32)}, file)
    query = {"intervention": "mean-heads", "tokens": "2", "heads": "L0H1,L2H3"}
    assert "mean-heads needs mean" in told(open_page("playground", **query))
    tab = open_page("playground", **query, mean=str(file))
    button(tab, "Generate both").click().run()
    assert not tab.error
    (_, edited), *_ = tab.session_state["play found"]
    model = wb.load("demo")
    with model.edit(MeanHeads(((0, 1), (2, 3)), torch.ones(2, 32))):
        wanted = model.generate(tab.text_area[0].value, max_new_tokens=2, do_sample=False)
    assert edited.text == wanted


CALIBRATED = {
    "name": "zerotuning",
    "version": 1,
    "layers": 4,
    "n_heads": 4,
    "heads": [[0, 1], [2, 3]],
    "gamma": [30.0, 0.02],
    "mode": "score",
    "calibration": {
        "task": "sst2",
        "table": {"uncalibrated": {"accuracy": 0.25}, "calibrated": {"accuracy": 0.5}},
    },
}


@needs_demo
def test_the_playground_loads_a_calibration_and_saves_one():
    tab = open_page("playground", tokens="2")
    content = json.dumps(CALIBRATED).encode()
    tab.file_uploader[0].upload("zt.json", content, "application/json").run()
    assert not tab.exception
    assert not tab.error
    assert "zt.json: zerotuning, gamma = [30.0, 0.02]" in told(tab)
    assert "heads: L0H1, L2H3" in told(tab)
    assert list(tab.dataframe[0].value["calibrated"]) == ["0.5"]
    button(tab, "Generate both").click().run()
    attention = tab.session_state["play found"][1]
    # The attention that moved is that of the file's heads, so the file is what was applied.
    moved = np.abs(attention[1] - attention[0]).sum(-1)
    assert moved[0, 1] > 1e-3
    assert moved[0, [0, 2, 3]].max() < 1e-6
    assert list(tab.get("download_button"))


def test_what_the_playground_saves_loads_again_and_tells_no_folder():
    form = {"name": "zerotuning", "version": 1, "gamma": 2.0, "mode": "score", "heads": None}
    saved = json.loads(file_text(form, "/home/someone/models/mine/", 4, 8))
    assert from_content(saved) == ZeroTuning(2.0)
    assert (saved["model"], saved["layers"], saved["n_heads"]) == ("mine", 4, 8)
    # A calibration that was loaded is saved as it is, its scores with it.
    assert json.loads(file_text(CALIBRATED, "demo", 4, 4)) == {**CALIBRATED, "model": "demo"}


@needs_demo
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**CALIBRATED, "layers": 5}, "layers is 5"),
        ({**CALIBRATED, "n_heads": 8}, "n_heads is 8"),
        ({**CALIBRATED, "gamma": -1}, "gamma must be above 0"),
        ({**CALIBRATED, "gamma": 2.0, "heads": [[0, 9]]}, "4 layers x 4 heads"),
        ([], "one JSON object"),
    ],
    ids=["layers", "heads", "gamma", "head", "list"],
)
def test_a_file_that_does_not_fit_is_told_on_the_playground(content, words):
    tab = open_page("playground", tokens="2")
    tab.file_uploader[0].upload("zt.json", json.dumps(content).encode(), "application/json").run()
    buttons = [button for button in tab.button if button.label == "Generate both"]
    if buttons:  # what is wrong for any model is told before
        buttons[0].click().run()
    assert not tab.exception
    assert words in told(tab)


@needs_demo
def test_a_file_without_heads_changes_nothing():
    tab = open_page("playground", tokens="2")
    content = {"name": "zerotuning", "gamma": 3.0, "heads": []}
    tab.file_uploader[0].upload("none.json", json.dumps(content).encode(), "application/json").run()
    assert "none, so nothing changes" in told(tab)
    button(tab, "Generate both").click().run()
    attention = tab.session_state["play found"][1]
    assert np.array_equal(attention[0], attention[1])
