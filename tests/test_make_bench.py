"""``make bench``: every benchmark to its end, whatever one of them does, and the page from what was found."""

import argparse
import sys
from pathlib import Path

import pytest

from tests.scripts import benchmarks

RECORD = """
import sys
sys.path.insert(0, {real!r})
import record
record.OUT = record.Path({out!r})
with open({log!r}, "a") as file:
    file.write({name!r} + "\\n")
if __name__ == "__main__":
    {end}
"""


@pytest.fixture(scope="module")
def load():
    with benchmarks() as import_script:
        yield import_script


@pytest.fixture
def everything(load, tmp_path, monkeypatch):
    """The script on a folder of small benchmarks; ``add(name, end)`` writes one."""
    script = load("everything")
    real = str(Path(script.__file__).parent)
    out, log = tmp_path / "out", tmp_path / "log.txt"
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "OUT", out)
    monkeypatch.setattr(sys, "argv", ["everything.py"])

    def add(name, end="pass"):
        about = {"real": real, "out": str(out), "log": str(log), "name": name, "end": end}
        (tmp_path / f"{name}.py").write_text(RECORD.format(**about))

    for page in ("render", "agreement"):
        add(page)
    script.add, script.ran = add, lambda: log.read_text().split() if log.exists() else []
    return script


def test_one_that_fails_stops_no_other_and_is_named(everything, capsys):
    everything.add("a")
    everything.add("b", "sys.exit(3)")
    everything.add("c", "record.not_here('a GPU must be there; none is')")
    everything.add("d")
    assert everything.main() == 1
    assert everything.ran() == ["a", "b", "c", "d", "agreement", "render"]
    said = capsys.readouterr().err
    assert "b: failed with exit code 3" in said
    assert "failed: b;" in said
    assert "c: left out" in said


def test_what_has_ended_is_not_measured_again_when_a_run_was_stopped(everything, capsys):
    everything.add("a")
    everything.add("b", "sys.exit(3)")
    everything.measure(["a", "b"])
    everything.add("b")
    assert everything.main() == 0
    assert everything.ran() == ["a", "b", "b", "agreement", "render"]


def test_a_run_that_is_stopped_says_how_it_goes_on(everything, monkeypatch, capsys):
    everything.add("a")

    def stop(*line):
        raise KeyboardInterrupt

    monkeypatch.setattr(everything, "run", stop)
    assert everything.main() == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (everything.OUT / "ended.txt").exists()


def test_some_can_be_named(everything, monkeypatch):
    everything.add("a")
    everything.add("b")
    monkeypatch.setattr(sys, "argv", ["everything.py", "b"])
    assert everything.main() == 0
    assert everything.ran() == ["b", "agreement", "render"]


@pytest.fixture
def folders(load, tmp_path, monkeypatch):
    """``render`` and ``record`` on empty folders of what was measured and of what is kept."""
    render, record = load("render"), load("record")
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir(), results.mkdir()
    monkeypatch.setattr(render, "OUT", out)
    monkeypatch.setattr(render, "RESULTS", results)
    return render, record, out, results


def test_adopting_ends_a_run(folders):
    """What was measured moves to the kept numbers, so that the next run measures all anew."""
    render, record, out, results = folders
    rows = [record.Row(name="a", peer="workbench", ratio=1.0)]
    record.write_record("one", rows, command="c", ratio_means="r", path=out / "one.json")
    (out / "ended.txt").write_text("one\n")
    render.adopt([])
    assert [path.name for path in results.iterdir()] == ["one.json"]
    assert list(out.iterdir()) == []


def test_of_a_benchmark_that_failed_nothing_is_adopted(everything, load, monkeypatch):
    everything.add("a")
    everything.add("b", "record.write_record('b', [], command='', ratio_means=''); sys.exit(1)")
    asked = []
    run = everything.run
    monkeypatch.setattr(everything, "run", lambda *line: asked.append(line) or run(*line))
    assert everything.main() == 1
    assert asked[-1] == ("render.py", "--figures", "--adopt", "a")


def test_a_benchmark_may_write_records_that_begin_with_its_name(folders):
    render, record, out, results = folders
    for name in ("a", "a_more", "ab", "b"):
        record.write_record(name, [], command="c", ratio_means="r", path=out / f"{name}.json")
    render.adopt(["a"])
    assert sorted(path.name for path in results.iterdir()) == ["a.json", "a_more.json"]
    assert sorted(path.name for path in out.iterdir()) == ["ab.json", "b.json"]


def test_it_is_what_make_runs_and_it_knows_them_all(load):
    script = load("everything")
    makefile = (Path(script.__file__).parents[1] / "Makefile").read_text("utf-8")
    rule = makefile.split("\nbench:")[1].split("\n\n")[0]
    assert "benchmarks/everything.py" in rule
    named = set(script.benchmarks())
    assert {"capture", "generate", "attacks", "toy", "sweep", "app", "startup", "store"} < named
    assert not named & {"record", "everything", "render", "agreement", "peaks"}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("one / T = 1 / workbench / ratio", "1.25"),
        ("one / T = * / workbench / ratio", "1.25 to 3"),
        ("one / T = * / work* / median", "1,200"),
    ],
)
def test_a_number_in_a_sentence_is_the_tables(load, asked, found):
    render, record = load("render"), load("record")
    rows = [
        record.Row(name="T = 1", peer="workbench", ratio=1.25, median=1200.0),
        record.Row(name="T = 2", peer="workbench", ratio=3.0),
        record.Row(name="T = 2", peer="other", ratio=9.0),
    ]
    assert render.value({"one": {"rows": rows}}, asked) == found


def test_a_number_that_no_table_has_is_said_to_be_missing(load):
    """A peer that is not installed, a browser that is not there: the page is drawn all the same."""
    render, record = load("render"), load("record")
    rows = [record.Row(name="T = 1", peer="workbench", ratio=1.25)]
    for asked in ("one / T = 3 / workbench / ratio", "two / * / * / ratio", "one / * / * / median"):
        assert render.value({"one": {"rows": rows}}, asked) == "(not measured)"
    with pytest.raises(SystemExit, match="a sentence asks for 'one'"):
        render.value({"one": {"rows": rows}}, "one")


def test_every_number_of_the_kept_page_was_measured(load):
    assert "(not measured)" not in load("render").render_page()


def test_long_prompts_have_fewer_rounds_and_two_at_least(load):
    rounds_at = load("capture").rounds_at
    assert [rounds_at(n, 5) for n in (256, 1024, 2048, 4096)] == [5, 5, 2, 2]
    assert rounds_at(4096, 1) == 1


def test_peers_that_keep_whole_patterns_are_not_run_on_long_prompts(load):
    peers = list(load("capture_methods").PEERS)
    found = load("capture").measure(4096, 1, 1, peers)
    assert set(found) == set(peers)
    # 12 layers x 12 heads x 4096^2 floats.
    assert {row["error"] for row in found.values()} == {
        "keeps the 9.7 GB of patterns that eager keeps"
    }


def test_a_verb_of_the_store_stands_beside_what_its_bytes_cost(load, tmp_path):
    store, record = load("store"), load("record")
    rows = [
        record.Row(name="get", peer="workbench", unit="s", median=3.0),
        record.Row(name="get", peer="workbench", unit="CPU s", median=3.0),
        record.Row(name="gc", peer="workbench", unit="s", median=3.0),
    ]
    read = []
    get, cpu, gc = store.with_limits(rows, {"get": lambda: read.append(1)}, 2)
    assert len(read) == 3
    assert get.distance == pytest.approx(3.0 / get.limit)
    assert (cpu.limit, gc.limit) == (None, None)
    store.write_files({"a.json": b"{}", "b": b"12"}, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.json": b"{}",
        "b": b"12",
    }


def test_every_benchmark_can_be_run_without_options(load, monkeypatch):
    """As ``make bench`` calls it; an option that must be given, or a bad default, ends it at once."""

    class ReadError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def read(parser, *given):
        parse(parser, *given)
        raise ReadError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    for name in load("everything").benchmarks():
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        with pytest.raises(ReadError):
            load(name).main()
