"""The page of a whole store."""

import hashlib
import json
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest

from app.report import write_report
from tests.probes.figures import every_figure
from tests.probes.figures.planted import planted_result
from workbench.discovery import find_probe
from workbench.errors import StoreError
from workbench.result import Result
from workbench.store.results import Store

EVIL = '<script>alert(1)</script><img src="https://example.com/x.png">'


def key_of(name):
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def messages():
    return []


@pytest.fixture
def store(tmp_path, messages):
    return Store(tmp_path / "store", report=messages.append)


def keep(store, name="demo", measured=None, created="2026-01-01"):
    result = Result.from_measurement(
        find_probe("attention-sinks"),
        planted_result() if measured is None else measured,
        key=key_of(name),
        provenance={"model": name, "created": created, "environment": {"torch": "2.13.0"}},
    )
    store.publish(result)
    return result.key


class Page(HTMLParser):
    """What a browser would see: addresses, tags, and the text outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.tags, self.scripts, self.text = [], [], [], ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.rawdata and self.cdata_elem:
            self.scripts.append(data)
        else:
            self.text += data

    def figures(self):
        """The data of every figure, as plotly reads it."""
        data = [text for text in self.scripts if text.startswith('{"data"')]
        assert data
        return [json.dumps(json.loads(text)) for text in data]


def test_page_has_a_finding_the_figures_and_the_provenance_of_every_result(store, tmp_path):
    keys = [keep(store, name) for name in ("demo", "other")]
    page = Page(write_report(store, tmp_path / "page" / "report.html", title="What was found"))
    for key, model in zip(keys, ("demo", "other"), strict=True):
        assert key in page.text
        assert f"attention-sinks on {model}: 16.7% of (prompt, layer, head) triples" in page.text
    assert page.text.count("Heads that send their attention to position 0") == 2
    assert page.text.count("n = 2 prompts of 20 to 30 positions") >= 8
    assert "environment.torch" in page.text
    assert page.text.index("Findings") < page.text.index("Heads that send")
    assert page.text.count("What was found") == 2  # the tab's title and the heading


def test_the_newest_result_comes_first_unless_keys_are_given(store, tmp_path):
    old, new = keep(store, "old"), keep(store, "new", created="2026-02-02")
    text = Page(write_report(store, tmp_path / "all.html")).text
    assert text.index(f"key{new}") < text.index(f"key{old}")
    text = Page(write_report(store, tmp_path / "one.html", keys=[old[:8]])).text
    assert old in text
    assert new not in text


def test_page_loads_nothing_from_anywhere(store, tmp_path):
    keep(store)
    page = Page(write_report(store, tmp_path / "report.html"))
    assert page.addresses == [f"#{key_of('demo')}"]
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text("utf-8")


def test_texts_of_others_stay_text(store, tmp_path):
    keep(store, EVIL)
    path = write_report(store, tmp_path / "report.html", title=EVIL)
    page = Page(path)
    assert "img" not in page.tags
    assert "<script>alert" not in path.read_text("utf-8")
    assert f"attention-sinks on {EVIL}" in page.text


def test_a_tag_in_a_domain_or_a_token_is_text_in_every_figure(store, tmp_path):
    """The page's own script draws from data; in that data plotly would read markup."""
    measured = every_figure.dormant()
    probe = find_probe("active-dormant")
    result = Result.from_measurement(probe, measured, key=key_of("evil"), provenance={})
    store.publish(result)
    path = write_report(store, tmp_path / "report.html")
    page = Page(path)
    assert page.addresses == [f"#{key_of('evil')}"]
    assert f"Heads in {every_figure.EVIL} and in code" in page.text
    assert "&amp;lt;" not in path.read_text("utf-8")
    for data in page.figures():
        assert "<a href" not in data
        assert "&lt;a href" in data or "example.com" not in data


@pytest.mark.slow
def test_twenty_results_of_every_probe_fit_ten_megabytes(store, tmp_path):
    cases = [case for case in every_figure.RESULTS if case != "attention-sinks long"]
    for number in range(20):
        case = cases[number % len(cases)]
        measured = all_results(tmp_path)[case]
        key = key_of(f"{case} {number}")
        probe = find_probe(case.split()[0])
        store.publish(Result.from_measurement(probe, measured, key=key, provenance={}))
    path = write_report(store, tmp_path / "report.html")
    assert len(re.findall('<section id="', path.read_text("utf-8"))) == 20
    assert "Left out" not in Page(path).text
    assert path.stat().st_size < 10e6
    assert path.read_text("utf-8").count("* plotly.js v") == 1


@cache
def all_results(folder):
    return {case: make(folder) for case, make in every_figure.RESULTS.items()}


def test_twenty_results_of_large_models_fit_too(store, tmp_path):
    large = planted_result(lengths=(512, 400), n_layers=48, n_heads=25)  # as in GPT-2 XL
    keep(store, "one", large)
    one = write_report(store, tmp_path / "one.html")
    keep(store, "two", large)
    two = write_report(store, tmp_path / "two.html")
    each = two.stat().st_size - one.stat().st_size
    assert one.stat().st_size + 19 * each < 10e6
    assert two.read_text("utf-8").count("* plotly.js v") == 1


def test_damaged_and_unknown_results_are_left_out_with_the_reason(store, tmp_path, messages):
    keep(store, "whole")
    for name, file in (("flipped", "arrays.safetensors"), ("cut", "result.json")):
        path = store.folder(keep(store, name)) / file
        content = bytearray(path.read_bytes())
        content[-8] ^= 1
        path.write_bytes(content[:-1] if name == "cut" else content)
    publish(store, "stranger", probe="no-such-probe")
    publish(store, "misshapen", arrays={"score": np.zeros(3, np.float32)})
    text = Page(write_report(store, tmp_path / "report.html")).text
    assert "attention-sinks on whole: 16.7%" in text
    left_out = text[text.index("Left out") : text.rindex("attention-sinks on whole")]
    for name in ("flipped", "cut", "stranger", "misshapen"):
        assert key_of(name)[:12] in left_out, name
    assert "does not match its SHA-256" in left_out
    assert "no probe is called 'no-such-probe'" in left_out
    assert any(key_of("cut") in message for message in messages)


def publish(store, name, probe="attention-sinks", arrays=None):
    """Keep a result that no probe of ours has measured."""
    store.publish(
        Result(
            key=key_of(name),
            probe=probe,
            version=1,
            config={},
            arrays=arrays or {},
            metrics={"number": 1.0},
            provenance={"model": name},
        )
    )


def test_empty_store_says_what_to_run(store, tmp_path):
    with pytest.raises(StoreError, match="has none; run one first: workbench run attention-sinks"):
        write_report(store, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_unknown_key_is_an_error(store, tmp_path):
    keep(store)
    with pytest.raises(StoreError, match="no result has the key"):
        write_report(store, tmp_path / "report.html", keys=["abcdef"])


def test_a_failed_write_leaves_the_old_page(store, tmp_path, monkeypatch):
    keep(store)
    path = tmp_path / "report.html"
    path.write_text("the old page")
    monkeypatch.setenv("WORKBENCH_FAULT", "during-file:ENOSPC")
    with pytest.raises(StoreError, match="disk is full"):
        write_report(store, path)
    assert path.read_text() == "the old page"
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "store"}


def test_page_adapts_to_dark_and_narrow_screens(store, tmp_path):
    keep(store)
    text = write_report(store, tmp_path / "report.html").read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "@media (max-width" in text
