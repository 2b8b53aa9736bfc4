"""The page of benchmarks says what the kept numbers say, and no row of ours hides that it lost."""

import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.scripts import benchmarks

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def load():
    with benchmarks() as import_script:
        yield import_script


@pytest.fixture(scope="module")
def record(load):
    return load("record")


@pytest.fixture(scope="module")
def render(load):
    return load("render")


def test_the_page_is_what_the_kept_numbers_render_to(render):
    assert render.PAGE.read_text("utf-8") == render.render_page(), "run benchmarks/render.py"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_numbers_have_the_one_form(path, record):
    kept = record.read_record(path)
    assert set(kept) == {
        "benchmark",
        "command",
        "conditions",
        "ratio_means",
        "better",
        "machine",
        "versions",
        "date",
        "rows",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
    assert kept["rows"], "a benchmark without rows measured nothing"
    for row in kept["rows"]:
        ends = (row.least, row.median, row.most)
        known = [end for end in ends if end is not None]
        assert known == sorted(known), row
        assert row.median is None or row.unit, row
        measured = [row.median, row.least, row.ratio, row.ratio_least, row.cpu_ratio]
        assert any(value is not None for value in measured) or row.note, row


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_where_we_lose_the_row_says_why(path, record, render):
    kept = record.read_record(path)
    for row in kept["rows"]:
        winner = render.beaten_by(row, kept["rows"], kept["better"])
        assert winner is None or len(row.why) > 20, f"{row.name}: {winner.peer} is ahead; say why"


def test_a_row_that_loses_is_marked(record, render):
    ours = record.Row(name="a", peer="workbench", ratio=1.5, why="because", note="by hand")
    theirs = record.Row(name="a", peer="other", ratio=1.2)
    elsewhere = record.Row(name="b", peer="other", ratio=0.1)
    assert render.note(ours, [ours, theirs], "lower") == "**behind other**: because; by hand"
    assert render.note(ours, [ours, theirs, elsewhere], "higher") == "by hand"
    tie = record.Row(name="a", peer="other", ratio=1.4)
    assert "other" not in render.note(ours, [ours, tie], "lower")


@pytest.mark.parametrize(
    ("ratio", "better", "why", "said"),
    [
        (0.8, "higher", "because", "**behind the reference**: because"),
        (0.95, "higher", "because", ""),
        (1.2, "lower", "because", "**behind the reference**: because"),
        (1.2, "higher", "because", ""),
        (0.8, "higher", "", ""),  # the reference is no rival
    ],
)
def test_a_row_that_loses_to_the_reference_alone_is_marked(
    ratio, better, why, said, record, render
):
    row = record.Row(name="a", peer="workbench", ratio=ratio, why=why)
    assert render.note(row, [row], better) == said


def test_the_slower_cpu_time_counts_where_there_is_no_ratio(record, render):
    ours = record.Row(name="a", peer="workbench", cpu_ratio=1.0)
    theirs = record.Row(name="a", peer="other", cpu_ratio=2.0)
    assert render.beaten_by(ours, [ours, theirs], "higher") is theirs
    assert render.beaten_by(ours, [ours, theirs], "lower") is None


def test_what_is_written_is_read_again(tmp_path, record):
    rows = [
        record.Row(name="a", peer="workbench", **record.spread([3.0, 1.0, 2.0]), unit="s"),
        record.Row(
            name="a", peer="b", **record.ratios([2.0, 9.0], [1.0, 3.0]), points=((1.0, 2.0),)
        ),
    ]
    path = record.write_record("x", rows, command="c", ratio_means="r", path=tmp_path / "x.json")
    again = record.read_record(path)
    assert again["rows"] == [
        record.Row(name="a", peer="workbench", median=2.0, least=1.0, most=3.0, unit="s"),
        record.Row(
            name="a", peer="b", ratio=2.5, ratio_least=2.0, ratio_most=3.0, points=((1.0, 2.0),)
        ),
    ]
    assert again["versions"]["torch"] != "not installed"


def test_an_entry_that_no_row_has_is_refused(tmp_path, record):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": [{"name": "a", "peer": "b", "medain": 1}]}))
    with pytest.raises(TypeError, match="medain"):
        record.read_record(path)


def test_only_records_are_adopted(tmp_path, monkeypatch, capsys, record, render):
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir(), results.mkdir()
    monkeypatch.setattr(render, "OUT", out)
    monkeypatch.setattr(render, "RESULTS", results)
    rows = [record.Row(name="a", peer="workbench", ratio=1.0)]
    record.write_record("good", rows, command="c", ratio_means="r", path=out / "good.json")
    (out / "other.json").write_text('{"peers": {}}')
    render.adopt([])
    assert [path.name for path in results.iterdir()] == ["good.json"]
    assert "other.json" in capsys.readouterr().err


def test_every_benchmark_writes_the_one_form():
    texts = {path.name: path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    run = {name for name, text in texts.items() if "__main__" in text}
    assert {"sweep.py", "store.py"} < run
    # One runs the others, one draws the page, one has a page of its own.
    for name in run - {"everything.py", "render.py", "agreement.py"}:
        assert "write_record(" in texts[name], name


def test_rows_of_executors_say_which_way_they_are_and_what_is_faster(load):
    executors = load("executors")
    table = load("cells").Table()
    same = {"ready": 1.0, "load": 1.0, "cell": 1.0}
    clocks = [{"wall": 4.0, "steady": 2.0, **same}, {"wall": 6.0, "steady": 4.0, **same}]
    other = [{"wall": 2.0, "steady": 4.0, **same}, {"wall": 2.0, "steady": 4.0, **same}]
    executors._compare(table, "one worker", "two workers", "8 cells", clocks, other, cpu=False)
    one, two = [row for row in table.rows if row.name == "whole sweep"]
    assert (one.peer, one.median, one.ratio) == ("workbench, one worker", 5.0, None)
    assert (two.peer, two.ratio, two.ratio_most) == ("workbench, two workers", 2.5, 3.0)
    assert one.is_ours
    assert two.is_ours
    steady = table.rows[-1]
    assert (steady.unit, steady.ratio) == ("s a cell", 0.75)
    assert "pace" in steady.name


def test_a_ray_that_does_not_start_is_a_row_without_a_figure(load, monkeypatch, tmp_path):
    def init(**settings):
        raise RuntimeError("timed out\nduring startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    for name in ("RAY_USAGE_STATS_ENABLED", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    table = load("cells").Table()
    load("executors").ray(table, tmp_path, SimpleNamespace(cells=8, rounds=1))
    (row,) = table.rows
    assert (row.median, row.ratio) == (None, None)
    assert row.note == "not measured: timed out during startup"


def test_rows_of_the_store_are_of_the_wall_and_of_the_processor(load):
    calls = []
    wall, cpu = load("store").timed(
        "a list", "7 results", lambda: calls.append(time.sleep(0.02)), 3
    )
    assert len(calls) == 3
    assert (wall.unit, cpu.unit) == ("s", "CPU s")
    assert wall.least >= 0.02 > cpu.median  # to sleep takes no processor
    assert {row.shape for row in (wall, cpu)} == {"7 results"}


def test_exponents_are_those_of_a_power_law(load):
    scaling = load("scaling")
    exponent, residual = scaling.slope([(x, 3 * x**1.5) for x in (1.0, 2.0, 4.0, 16.0)])
    assert exponent == pytest.approx(1.5)
    assert residual == pytest.approx(0.0, abs=1e-12)
    _, residual = scaling.slope([(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)])
    # What a line leaves of three points at equal distances is (d, -2d, d).
    d = (2 * math.log(3) - math.log(4)) / 6
    assert residual == pytest.approx(math.sqrt(6 * d * d / 3))


SMALL = {
    "sinks": (2, 12),
    "successor_heads": (1, 64),
    "information_flow": (1, 24),
    "concepts": (2, 2, (8, 4)),
    "state_space": (3, 5),
    "eigenvalues": (4, 32),
    "act": (32,),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_papers_procedures_find_what_ours_find(name, load):
    papers = load("papers")
    assert set(papers.CASES) == set(SMALL)
    with torch.no_grad():
        papers.check(papers.CASES[name](*SMALL[name]))


def test_two_computations_that_differ_are_not_compared(load):
    papers = load("papers")
    case = papers.Case("a", "", lambda: (torch.ones(2),), lambda: (torch.zeros(2),), "")
    with pytest.raises(SystemExit, match="not the same computation"):
        papers.check(case)


@pytest.mark.parametrize("unembed", [True, False])
def test_operations_of_a_forward_pass_are_those_that_torch_counts(unembed, load):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=16, attn_implementation="eager"))
    tokens = torch.zeros(3, 5, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens) if unembed else model.transformer(tokens)
    # Eager attention also multiplies what the causal mask hides: 5 x 5 scores for the 15 visible ones.
    hidden = shape["n_layer"] * 3 * (25 - 15) * 2 * 2 * shape["n_embd"]
    least = load("peaks").Decoder.gpt2(shape).flops(5, unembed=unembed, batch=3)
    assert least == counter.get_total_flops() - hidden


def test_operations_of_a_decoded_step_are_what_one_more_position_adds(load):
    """Of a longer pass over the shorter one: the new position's weights, and its row of the pattern."""
    flops = load("peaks").Decoder.gpt2({"n_layer": 2, "n_embd": 8, "vocab_size": 11}).flops
    whole = flops(8, unembed=True) - flops(7, unembed=True)
    assert flops(1, unembed=True, cached=7) == whole


def test_decoding_is_bound_by_what_a_step_must_read_and_multiply(load, monkeypatch):
    generate, peaks = load("generate"), load("peaks")
    monkeypatch.setattr(peaks, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(peaks, "peak_bandwidth", lambda: 1e6)
    model = {"n_layer": 2, "n_embd": 8, "vocab_size": 11}
    rows = generate.limit_rows({"model": model, "batch": 3, "n_pos": 6, "n_new": 2}, "x", 1)
    words = 2 * 12 * 64 + 8 * 11  # of weights: blocks and unembedding
    caches = 2 * 2 * 8 * 7  # a key and a value of 8 in two layers at seven positions
    arithmetic = 2 * 3 * (words + 2 * 2 * 8 * 8) / 1e9  # scores and mix over eight keys
    assert [row.median for row in rows] == pytest.approx(
        [3 / arithmetic, 3 / (4 * (words + 3 * caches) / 1e6)]
    )


def test_the_least_time_is_that_of_the_scarcer_resource(load):
    peaks = load("peaks")
    least = peaks.least_seconds(8.0, 6.0, (4.0, 2.0))
    assert least == {"arithmetic": 2.0, "bandwidth": 3.0, "limit": 3.0}
    # 2 blocks of 12 matrices of 8 x 8, and for each of 7 cached positions of 3 prompts a key and a value.
    decoder = peaks.Decoder.gpt2({"n_layer": 2, "n_embd": 8, "vocab_size": 11})
    weights = 2 * 12 * 64
    assert decoder.n_bytes(unembed=False) == 4 * weights
    assert decoder.n_bytes(unembed=True, cached=7, batch=3) == 4 * (
        weights + 8 * 11 + 3 * 7 * 2 * 2 * 8
    )
    assert decoder.n_bytes(unembed=False, word=2) == 2 * weights


def test_the_limit_of_a_race_is_that_of_the_fewer_products(load, monkeypatch):
    race = load("race")
    small, large, weight = torch.ones(2, 3), torch.ones(5, 3), torch.ones(3, 5, requires_grad=True)
    monkeypatch.setattr(
        race, "peak", lambda threads, dtype: 10.0 if dtype is torch.float32 else 5.0
    )
    once, back = 2 * 2 * 3 * 5, 2 * 3 * 2 * 5  # a product; its gradient by the weight
    found = race.race(lambda: large @ weight, lambda: (small @ weight).sum().backward(), 1)
    assert found["limit_s"] == (once + back) / 10.0  # the other has 150
    found = race.race(lambda: large @ weight, lambda: small @ weight, 1, torch.float64)
    assert found["limit_s"] == once / 5.0
    ours, theirs = race.rows_of("x", race.per(found, 3, 3, 7), 1)
    assert ours.limit == theirs.limit == pytest.approx(3 * 7 / (once / 5.0))
    assert theirs.distance == pytest.approx(found["theirs_s"] / (once / 5.0))
    assert race.rows_of("x", race.per(found, 3, 1), 1)[0].limit is None
    assert race.rows_of("x", race.race(small.exp, small.exp, 1), 1)[0].limit is None


def test_pictures_are_of_the_kept_numbers(load, render):
    pytest.importorskip("plotly")
    figures = load("figures")
    assert figures.asked_for(), "a page of ratios has pictures"
    for name in figures.asked_for():
        drawn = (render.IMAGES / render.picture(name)).read_text("utf-8")
        assert figures.digest(name) in drawn, "run benchmarks/render.py --figures"
