"""Every page as a person meets it: an empty store, a full one, damage, wrong addresses."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import streamlit as st
import torch
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import app
import workbench as wb
from app import jobs, models, registry
from app.components.arrays import array_of
from app.components.asked import asked_by_job, asked_by_provenance
from app.components.both_models import sink_mass_figure
from app.components.result_view import stock_twin
from app.components.text import plain
from app.views.playground import file_text
from tests.probes.figures.planted import planted_result
from workbench.discovery import find_probe, load_probes
from workbench.errors import ModelError
from workbench.generation import compare_generation
from workbench.interventions.files import from_content
from workbench.interventions.mean_heads import MeanHeads
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import Site
from workbench.models.names import demo_folder
from workbench.result import Result
from workbench.store.results import Store

MAIN = str(Path(app.__path__[0]) / "main.py")
OWN = ("overview", "compare", "playground", "training", "jobs", "sweeps")
PAGES = (*OWN, *registry.probe_names())
EVIL = "<img src=x onerror=alert(1)> **bold** :smile: $x$ [a](https://b.example)"

needs_demo = pytest.mark.skipif(
    not (demo_folder() / "config.json").is_file(), reason="needs the demo model"
)


def open_page(page, **query):
    tab = AppTest.from_file(MAIN, default_timeout=120)
    # The public way to another page is for pages that are files; ours are made from the registry.
    tab._page_hash = calc_hash("" if page == "overview" else page)
    for name, value in query.items():
        tab.query_params[name] = value
    return tab.run()


def texts(tab, *kinds):
    return " ".join(str(shown.value) for kind in kinds for shown in getattr(tab, kind))


def told(tab):
    """What a page tells, escapes taken away."""
    seen = texts(tab, "error", "warning", "info", "success", "caption", "markdown", "title")
    return seen.replace("\\", "").replace("\u2060", "")


def key_of(name):
    return hashlib.sha256(name.encode()).hexdigest()


def keep(path, name="demo", model=None, measured=None):
    result = Result.from_measurement(
        find_probe("attention-sinks"),
        planted_result() if measured is None else measured,
        key=key_of(name),
        provenance={"model": model or name, "created": "2026-01-01", "prompts": {"source": EVIL}},
    )
    Store(path).publish(result)
    return result.key


@pytest.fixture(autouse=True)
def fresh_caches(store_path):
    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


@pytest.fixture
def full(store_path):
    return [keep(store_path, name) for name in ("one", "two", EVIL)]


def test_every_probe_has_a_page():
    assert registry.probe_names() == tuple(probe.name for probe in load_probes())


@pytest.mark.parametrize("page", PAGES)
@needs_demo
def test_a_page_opens_on_an_empty_store(page):
    tab = open_page(page)
    assert not tab.exception
    assert not tab.error
    assert tab.title[0].value
    if page not in OWN:
        every_setting_has_a_field_that_explains_it(tab, find_probe(page))


def every_setting_has_a_field_that_explains_it(tab, probe):
    kinds = ("number_input", "selectbox", "toggle", "text_input")
    shown = {box.key: box for kind in kinds for box in getattr(tab, kind)}
    for field in dataclasses.fields(probe.config):
        box = shown[f"run {probe.name} {field.name}"]
        said = box.help.replace("\\", "").replace("\u2060", "")
        assert " ".join(field.metadata["help"].split()) in said
        if unit := field.metadata.get("unit"):
            assert f"({unit})" in box.label
        ends = [field.metadata.get(end) for end in ("low", "high")]
        for end in ends:
            assert end is None or f"{end:g}" in said
        if hasattr(box, "min") and field.metadata.get("low") is not None:
            assert box.min == ends[0]


@pytest.mark.parametrize("page", PAGES)
@needs_demo
def test_a_page_opens_on_a_full_store(page, full):
    tab = open_page(page)
    assert not tab.exception
    assert not tab.error


@pytest.mark.parametrize("page", [page for page in PAGES if page != "playground"])
def test_a_page_says_when_the_store_disappears(page, full, store_path):
    tab = open_page(page)
    shutil.rmtree(store_path)
    st.cache_resource.clear()
    tab.run()
    assert not tab.exception
    assert "disappeared" in told(tab)


def test_a_result_shows_its_numbers_figures_and_head(full):
    tab = open_page("attention-sinks", key=full[0], head="L0H1")
    assert tab.metric[0].label.replace("\\", "") == "sink rate"
    assert tab.get("plotly_chart")
    assert [box.value for box in tab.selectbox if "Head" in box.label] == ["L0H1"]


@needs_demo
def test_a_long_prompt_is_shown_in_a_window_and_what_is_outside_is_said(full):
    """69 tokens and more: queries 3 to 66 with their own keys and the first four."""
    prompt = " ".join(["one two three four"] * 24)
    tab = open_page(
        "attention-sinks",
        key=full[0],
        head="L0H1",
        on="demo",
        pattern="yes",
        prompt=prompt,
        window="3",
    )
    assert not tab.exception
    with models.using("demo") as model:
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        whole = model.capture(ids, [Site("pattern", 0)])[Site("pattern", 0)][0, 1].numpy()
    shown = whole[3:67, [0, 1, 2, *range(3, 67)]]
    spec = json.loads(tab.get("plotly_chart")[-1].proto.spec)
    drawn = array_of(spec["data"][0]["z"])
    np.testing.assert_allclose(np.nan_to_num(drawn), shown, atol=1e-5)
    outside = float(1 - shown.sum(axis=1).mean())
    assert f"{ids.shape[1]} tokens; queries 3 to 66 are shown" in told(tab)
    assert f"{outside:.1%} of their attention goes to keys that are not shown" in told(tab)


@needs_demo
def test_a_prompt_that_the_model_cannot_read_is_refused(full):
    tab = open_page("attention-sinks", key=full[0], on="demo", pattern="yes", prompt="one " * 5000)
    assert not tab.exception
    assert "a prompt must have at most" in told(tab)


def test_damaged_arrays_are_told_in_one_line(full, store_path):
    arrays = Store(store_path).folder(full[0]) / "arrays.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 255
    arrays.write_bytes(data)
    tab = open_page("attention-sinks", key=full[0])
    assert not tab.exception
    assert "SHA-256" in told(tab)
    assert not open_page("attention-sinks").error


def test_a_truncated_result_does_not_hide_the_others(full, store_path):
    (Store(store_path).folder(full[0]) / "result.json").write_text("{")
    tab = open_page("overview")
    assert not tab.exception
    assert "1 results cannot be shown" in " ".join(box.label for box in tab.expander)
    assert "2 results of 2 models in" in told(tab)


def test_a_result_of_a_newer_schema_is_named_and_left_alone(full, store_path):
    manifest = Store(store_path).folder(full[0]) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "schema": 99}))
    tab = open_page("overview")
    assert not tab.exception
    assert "newer workbench" in " ".join(map(str, tab.dataframe[0].value["reason"]))
    assert manifest.exists()


WRONG = [
    ("attention-sinks", {"key": "nonsense"}, "key"),
    ("attention-sinks", {"key": "0" * 64}, "key"),
    ("attention-sinks", {"figure": "no-such"}, "no figure is called"),
    ("attention-sinks", {"head": "L99H99"}, "no head is called"),
    ("attention-sinks", {"job": "../../etc/passwd"}, "job must be the id"),
    ("attention-sinks", {"s.threshold": "many"}, "threshold must be a number"),
    ("attention-sinks", {"seed": "-1"}, "seed must be a whole number"),
    ("attention-sinks", {"figur": "x"}, "Did you mean 'figure'"),
    ("overview", {"model": "nobody"}, "no model is called"),
    ("compare", {"keys": "zz"}, "at least 6"),
    ("compare", {"keys": ",".join([key_of("one")[:12]] * 7)}, "at most 6 results"),
    ("compare", {"probe": "attention-sink"}, "Did you mean 'attention-sinks'"),
    ("jobs", {"job": "x"}, "job must be the id"),
    ("jobs", {"state": "lost"}, "no state is called"),
    ("training", {"toy": "bigram"}, "no toy is called"),
    ("sweeps", {"sweep": "../../etc"}, "sweep must be the key"),
    ("attention-sinks", {"edited": "perhaps"}, "no edited is called"),
    ("attention-sinks", {"edited": "yes", "gamma": "-3"}, "gamma must be a number from 0.05 to 4"),
    ("attention-sinks", {"edited": "yes", "heads": "L9H9"}, "no head of this model is called"),
]


@pytest.mark.parametrize(("page", "query", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_address_says_so(page, query, words, full, store_path):
    jobs.jobs_folder(store_path).mkdir(parents=True)
    tab = open_page(page, **query)
    assert not tab.exception
    assert words in told(tab)


def test_selections_survive_a_reload(full):
    tab = open_page("attention-sinks")
    figure = next(box for box in tab.selectbox if box.label == "Figure")
    second = figure.options[1].replace(" ", "_")
    figure.set_value(second).run()
    threshold = next(box for box in tab.number_input if box.label.startswith("threshold"))
    threshold.set_value(0.5).run()
    query = dict(tab.query_params)
    assert query["figure"] == second
    assert query["s.threshold"] == "0.5"
    again = open_page("attention-sinks", **query)
    assert next(box.value for box in again.selectbox if box.label == "Figure") == second
    assert next(box.value for box in again.number_input if box.label.startswith("threshold")) == 0.5
    assert dict(again.query_params) == query


def test_a_complaint_goes_when_something_is_chosen(full):
    tab = open_page("attention-sinks", figure="no-such")
    assert "no figure is called" in told(tab)
    figure = next(box for box in tab.selectbox if box.label == "Figure")
    figure.set_value(figure.options[1].replace(" ", "_")).run()
    assert "no figure is called" not in told(tab)


def test_a_setting_out_of_range_stops_the_start(full):
    tab = open_page("attention-sinks", **{"s.threshold": "1.0"})
    assert "threshold must be strictly between" in told(tab)
    assert next(button for button in tab.button if button.label == "Start").disabled


def test_texts_of_others_are_never_markup(full):
    tab = open_page("attention-sinks", key=full[2])
    other = open_page("overview", model=EVIL)
    for page in (tab, other):
        for shown in (*page.markdown, *page.caption, *page.success, *page.title):
            for mark in ("<img", "**bold", ":smile", "$x$", "[a]("):
                place = shown.value.find(mark)
                assert place < 0 or shown.value[place - 1] == "\\", shown.value


@pytest.mark.parametrize("mark", ["<b>", "**a**", "[a](b)", "#a", ":smile:", "$a$", "`a`", "a_b_"])
def test_plain_escapes_every_mark(mark):
    shown = plain(mark)
    assert shown.replace("\\", "").replace("\u2060", "") == mark
    for place, letter in enumerate(shown):
        assert letter not in "<>*[]#:$`_" or shown[place - 1] == "\\"


@pytest.mark.slow
@needs_demo
def test_starting_a_run_from_the_page_ends_with_its_result(store_path):
    query = {"limit": "2", "n_pos": "32"}
    tab = open_page("attention-sinks", **query)
    next(button for button in tab.button if button.label == "Start").click().run()
    assert not tab.exception
    job_id = dict(tab.query_params)["job"]
    second = open_page("attention-sinks", **query)
    next(button for button in second.button if button.label == "Start").click().run()
    assert dict(second.query_params)["job"] == job_id
    wait_until_done(store_path, job_id)
    done = jobs.read(store_path, job_id)
    assert done.state == "done", jobs.log_tail(done)
    assert done.done == done.total > 0
    again = open_page("attention-sinks", job=job_id)
    assert not again.exception
    assert next(box.value for box in again.selectbox if box.label.startswith("Result")) == done.key
    notebook_measures_it_again(done.key, store_path, asked_by_job(done))


def wait_until_done(store_path, job_id):
    import time

    end = time.monotonic() + 120
    while jobs.read(store_path, job_id).is_running and time.monotonic() < end:
        time.sleep(0.2)


def notebook_measures_it_again(key, store_path, asked):
    from app.components.notebook import notebook

    document = json.loads(notebook(Store(store_path).get(key), store_path, asked))
    names = {}
    for cell in document["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "figure.show" not in source:
            exec(source, names)
    assert names["again"].key == key
    assert names["again"].metrics() == names["result"].metrics()


@needs_demo
@pytest.mark.parametrize(
    ("data", "how"),
    [
        ("builtin:natural", {"limit": 2}),  # whole prompts, no two of one length
        ("random", {"limit": 2, "n_pos": 16, "threshold": 0.5, "seed": 3}),
        (
            "builtin:natural",
            {
                "limit": 1,
                "n_pos": 16,
                "intervention": {"name": "zerotuning", "gamma": 3.0, "heads": [[0, 1]]},
            },
        ),
    ],
    ids=["whole", "random", "edited"],
)
def test_the_notebook_of_a_run_from_elsewhere_measures_it_again(data, how, store_path):
    found = wb.run("attention-sinks", "demo", data, store=store_path, **how)
    asked = asked_by_provenance(Store(store_path).get(found.key))
    notebook_measures_it_again(found.key, store_path, asked)


@pytest.mark.parametrize(
    "about", [{"model": "mine"}, {"prompts": {"source": "texts.txt", "n_prompts": 1}}]
)
def test_what_lies_nobody_knows_where_is_not_promised_to_be_measured_again(about, full, store_path):
    result = Store(store_path).get(full[0])
    made = {**result.provenance, "model": "demo", "prompts": {"source": "random", "n_prompts": 1}}
    result.provenance = made
    assert asked_by_provenance(result) is not None
    result.provenance = {**made, **about}
    assert asked_by_provenance(result) is None
    assert "cannot measure it again" in told(open_page("attention-sinks", key=full[0]))


def test_a_model_too_large_is_refused_with_the_estimate(tmp_path, monkeypatch):
    tensor = {"dtype": "F32", "shape": [1000, 10**12], "data_offsets": [0, 4 * 10**15]}
    header = json.dumps({"w": tensor}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert models.weight_bytes(str(tmp_path)) == 4 * 10**15
    assert models.weight_bytes(str(tmp_path), "float16") == 2 * 10**15
    with pytest.raises(ModelError, match=r"about 5000000\.0 GB"):
        models.refuse_too_large(str(tmp_path))
    tab = open_page("attention-sinks", model=str(tmp_path))
    next(button for button in tab.button if button.label == "Start").click().run()
    assert "must fit in memory" in told(tab)
    assert "job" not in dict(tab.query_params)


def test_a_job_of_a_killed_process_is_shown_as_killed(store_path):
    folder = jobs.jobs_folder(store_path) / "0123456789abcdef0000"
    folder.mkdir(parents=True)
    asked = {"kind": "run", "name": "attention-sinks", "arguments": ["run"], "about": {}}
    (folder / "request.json").write_text(json.dumps(asked))
    (folder / "status.json").write_text(json.dumps({"pid": 2**22 + 1, "birth": "1"}))
    (folder / "log").write_text('{"done": 3, "total": 8}\nworkbench: loading <b>weights</b>\n')
    tab = open_page("jobs")
    assert "killed" in told(tab)
    assert list(tab.dataframe[0].value["progress"]) == ["3/8"]
    assert tab.code[-1].value == "loading <b>weights</b>"
    assert list(tab.dataframe[0].value["state"]) == ["killed"]


def test_six_results_are_compared_on_the_same_axes_and_each_with_the_first(full, store_path):
    planted = planted_result()
    half = dataclasses.replace(planted, score=planted.score / 2)
    other = keep(store_path, "other", measured=half)
    keys = [*full, other, keep(store_path, "five"), keep(store_path, "six")]
    tab = open_page("compare", keys=",".join(key[:12] for key in keys))
    assert not tab.exception
    together, gap = (json.loads(chart.proto.spec) for chart in tab.get("plotly_chart"))
    assert (len(together["data"]), len(gap["data"])) == (6, 5)
    assert told(tab).count("n = 2 prompts") == 6
    table = tab.dataframe[0].value
    gaps = list(table[table.metric == "mean_score"].iloc[0, 7:])
    whole = Store(store_path).get(full[0]).metrics()["mean_score"]
    assert gaps == ["+0", "+0", f"{-whole / 2:+.4g}", "+0", "+0"]


@needs_demo
def test_an_edited_run_from_the_form_stands_beside_the_stock_one(store_path):
    query = {"limit": "2", "n_pos": "32", "edited": "yes", "gamma": "4", "heads": "L0H1"}
    tab = open_page("attention-sinks", **query)
    assert not tab.error
    next(button for button in tab.button if button.label == "Start").click().run()
    job_id = dict(tab.query_params)["job"]
    wait_until_done(store_path, job_id)
    done = jobs.read(store_path, job_id)
    assert done.state == "done", jobs.log_tail(done)
    edited = Store(store_path).get(done.key)
    stock = wb.run(
        "attention-sinks", "demo", "builtin:natural", n_pos=32, limit=2, store=store_path
    )
    assert edited.provenance["interventions"][0]["gamma"] == 4
    assert edited.provenance["interventions"][0]["heads"] == [[0, 1]]
    gap = (edited.score - stock.score)[:, :, :, 0]  # only the chosen head, and what lies behind it
    assert (gap[:, 0, 1] > 0).all()
    assert gap[:, 0, [0, 2, 3]].abs().max() < 1e-6
    notebook_measures_it_again(done.key, store_path, asked_by_job(done))
    st.cache_resource.clear()
    shown = open_page("attention-sinks", key=done.key)
    assert "Measured on demo under ZeroTuning gamma=4.0 L0H1" in told(shown)
    assert stock_twin(edited) == stock.key
    both = open_page("compare", keys=f"{stock.key[:12]},{done.key[:12]}")
    assert {"demo stock", "demo ZeroTuning gamma=4.0 L0H1 mode=score"} <= set(
        both.dataframe[0].value.columns
    )
    over = open_page("overview", model="demo", probe="attention-sinks")
    assert "attention-sinks on demo, " in told(over)  # the stock model's stands for the model


@needs_demo
def test_an_intervention_without_its_heads_stops_the_start():
    tab = open_page("attention-sinks", edited="yes", intervention="zero-heads")
    assert "zero-heads needs heads" in told(tab)
    assert next(button for button in tab.button if button.label == "Start").disabled


@needs_demo
def test_the_playground_writes_both_continuations():
    tab = open_page("playground", tokens="4", gamma="0.05")
    next(button for button in tab.button if button.label == "Generate both").click().run()
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
    next(button for button in tab.button if button.label == "Generate both").click().run()
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
    next(button for button in tab.button if button.label == "Generate both").click().run()
    assert "no.safetensors: no such file" in told(tab)


@needs_demo
def test_the_playground_takes_means_of_heads_from_a_file(tmp_path):
    file = tmp_path / "m.safetensors"
    save_file({"mean": torch.ones(2, 32)}, file)
    query = {"intervention": "mean-heads", "tokens": "2", "heads": "L0H1,L2H3"}
    assert "mean-heads needs mean" in told(open_page("playground", **query))
    tab = open_page("playground", **query, mean=str(file))
    next(button for button in tab.button if button.label == "Generate both").click().run()
    assert not tab.error
    (_, edited), *_ = tab.session_state["play found"]
    model = wb.load("demo")
    with model.edit(MeanHeads(((0, 1), (2, 3)), torch.ones(2, 32))):
        wanted = model.generate(tab.text_area[0].value, max_new_tokens=2, do_sample=False)
    assert edited.text == wanted


def test_a_choice_that_comes_with_an_old_url_does_not_undo_the_last_one(full):
    """A quick typist: the browser sends the second choice before it has the URL of the first."""
    tab = open_page("attention-sinks")

    def numbers():
        return {box.label: box.value for box in tab.number_input}

    next(box for box in tab.number_input if box.label == "Seed").set_value(7).run()
    assert dict(tab.query_params)["seed"] == "7"
    del tab.query_params["seed"]
    next(box for box in tab.number_input if box.label == "Prompts at most").set_value(3).run()
    assert (numbers()["Seed"], numbers()["Prompts at most"]) == (7, 3)
    query = dict(tab.query_params)
    assert (query["seed"], query["limit"]) == ("7", "3")


def test_going_back_in_the_browser_takes_a_choice_back(full):
    tab = open_page("attention-sinks")
    next(box for box in tab.number_input if box.label == "Seed").set_value(7).run()
    del tab.query_params["seed"]
    tab.run()
    assert next(box.value for box in tab.number_input if box.label == "Seed") is None
    tab.query_params["seed"] = "7"
    tab.run()
    assert next(box.value for box in tab.number_input if box.label == "Seed") == 7


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
    next(button for button in tab.button if button.label == "Generate both").click().run()
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
    next(button for button in tab.button if button.label == "Generate both").click().run()
    attention = tab.session_state["play found"][1]
    assert np.array_equal(attention[0], attention[1])
