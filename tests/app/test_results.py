"""One result on its probe's page, several compared; texts of others stay texts."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import torch

from app import models
from app.components.arrays import array_of
from app.components.text import plain
from tests.app.opening import EVIL, keep, needs_demo, open_page, told
from tests.probes.figures.planted import planted_result
from workbench.models.base import Site
from workbench.store.results import Store

pytestmark = pytest.mark.usefixtures("fresh_caches")


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
