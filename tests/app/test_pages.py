"""Every page as a person meets it: an empty store, a full one, damage."""

import dataclasses
import json
import shutil

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import streamlit as st

from app import jobs, registry
from tests.app.opening import OWN, needs_demo, open_page, told
from workbench.discovery import find_probe, load_probes
from workbench.store.results import Store

pytestmark = pytest.mark.usefixtures("fresh_caches")

PAGES = (*OWN, *registry.probe_names())


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
