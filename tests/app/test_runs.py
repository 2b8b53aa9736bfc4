"""Runs started from a probe's page, and notebooks that measure a result again."""

import json

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import streamlit as st

import workbench as wb
from app import jobs, models
from app.components.asked import asked_by_job, asked_by_provenance
from app.components.result_view import stock_twin
from tests.app.opening import button, needs_demo, open_page, told
from workbench.errors import ModelError
from workbench.store.results import Store

pytestmark = pytest.mark.usefixtures("fresh_caches")


def test_a_setting_out_of_range_stops_the_start(full):
    tab = open_page("attention-sinks", **{"s.threshold": "1.0"})
    assert "threshold must be strictly between" in told(tab)
    assert button(tab, "Start").disabled


@pytest.mark.slow
@needs_demo
def test_starting_a_run_from_the_page_ends_with_its_result(store_path):
    query = {"limit": "2", "n_pos": "32"}
    tab = open_page("attention-sinks", **query)
    button(tab, "Start").click().run()
    assert not tab.exception
    job_id = dict(tab.query_params)["job"]
    second = open_page("attention-sinks", **query)
    button(second, "Start").click().run()
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
    button(tab, "Start").click().run()
    assert "must fit in memory" in told(tab)
    assert "job" not in dict(tab.query_params)


@needs_demo
def test_an_edited_run_from_the_form_stands_beside_the_stock_one(store_path):
    query = {"limit": "2", "n_pos": "32", "edited": "yes", "gamma": "4", "heads": "L0H1"}
    tab = open_page("attention-sinks", **query)
    assert not tab.error
    button(tab, "Start").click().run()
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
    assert button(tab, "Start").disabled
