"""Mutants of a small module, and the whole tool on it in a process of its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.__main__ import report, wilson
from tests.mutation.mutants import mutants, variants
from tests.mutation.sampling import draw, read_rows
from tests.mutation.tracing import read_tests

ROOT = Path(__file__).parents[2]

CODE = '''"""A module."""

LIMIT = 2 + 3


class Box:
    """Its 3 sides."""

    def volume(self, x: "int | float" = 4, *, checked: bool = True) -> "1 + 1":
        """One of 5."""
        if x < 0 and not checked:
            raise ValueError(f"{x + 1} is bad")
        assert x > 7
        print(x)
        return max(-x, 2 * x) if checked else [a for a in zip(x, x, strict=True)]
'''


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a and b and c", ["a or b or c"]),
        ("a - b", ["a + b"]),
        ("a @ b", ["a + b"]),
        ("'text' + b", []),
        ("'%d' % b", []),
        ("not a", ["a"]),
        ("-a", ["a"]),
        ("~a", []),
        ("True", ["False"]),
        ("3", ["4"]),
        ("0.0", ["1.0"]),
        ("1.5", ["3.0"]),
        ("'text'", []),
        ("x.amin", ["x.amax"]),
        ("any", ["all"]),
        ("a if b else c", ["c if b else a"]),
        ("f(a)", []),
    ],
)
def test_what_may_stand_in_the_place_of_an_expression(before, after):
    node = ast.parse(before, mode="eval").body
    assert [ast.unparse(ast.fix_missing_locations(new)) for new in variants(node)] == after
    assert ast.unparse(node) == before


def test_a_call_for_its_effect_is_left_out_and_an_addition_turned():
    left_out, turned = ast.parse("f(a)\nn += 1").body
    assert [type(new) for new in variants(left_out)] == [ast.Pass]
    assert [ast.unparse(new) for new in variants(turned)] == ["n -= 1"]


def test_faults_are_planted_in_what_runs_and_nowhere_else(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(CODE)
    found = mutants(path)
    assert [mutant.change for mutant in found] == [
        "x < 0 and (not checked) -> x < 0 or not checked",
        "x < 0 -> x <= 0",
        "0 -> 1",
        "not checked -> checked",
        "print(x) -> pass",
        "max(-x, 2 * x) if checked else [a for a in zip(x, x, strict=True)] -> "
        "[a for a in zip(x, x, strict=True)] if checked else max(-x, 2 * x)",
        "max -> min",
        "-x -> x",
        "2 * x -> 2 / x",
        "2 -> 3",
    ]
    assert {mutant.function for mutant in found} == {"Box.volume"}
    plain = ast.unparse(ast.parse(CODE)).splitlines()
    for mutant in found:
        changed = [i for i, line in enumerate(mutant.source().splitlines()) if line != plain[i]]
        assert len(changed) == 1, mutant.change


def test_the_same_seed_draws_the_same_mutants(tmp_path):
    (tmp_path / "module.py").write_text(CODE)
    drawn = draw([tmp_path], 5, seed=3)
    assert len({mutant.number for mutant in drawn}) == 5
    assert draw([tmp_path / "module.py"], 5, seed=3) == drawn
    assert draw([tmp_path], 5, seed=4) != drawn
    assert len(draw([tmp_path], 99, seed=3)) == 10


def test_wilson_is_the_interval_of_the_score_test():
    low, high = wilson(8, 10)
    for share in (low, high):  # where (p - share)^2 = z^2 share (1 - share) / n
        assert (0.8 - share) ** 2 == pytest.approx(1.96**2 * share * (1 - share) / 10)
    assert low < 0.8 < high
    assert wilson(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.slow
def test_a_sample_tells_what_the_tests_of_a_project_notice(tmp_path, capsys):
    (tmp_path / "small.py").write_text(
        "def larger(a, b):\n    return a if a > b else b\n\n\ndef never():\n    return 1\n"
        "\n\ndef loops(n):\n    while n > 0:\n        n -= 1\n    return n\n"
        "\n\ndef once():\n    return 3\n"
    )
    (tmp_path / "test_small.py").write_text(
        "from pathlib import Path\n\nfrom small import larger, loops, once\n"
        "\n\ndef test_larger():\n    assert larger(2, 1) == 2\n"
        "\n\ndef test_loops():\n    assert loops(3) == 0\n"
        "\n\ndef test_once():\n    assert once() and not Path('map/tests.json').exists()\n"
    )

    def tool(*words):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.mutation", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "3 of 3 tests are in the map" in tool("map", "test_small.py", "-o", "map")
    assert all(row["passed"] for row in read_tests(tmp_path / "map").values())
    words = ("sample", "small.py", "--of", "map", "-o", "found.jsonl", "-n", "99", "--limit", "1")
    tool(*words)
    rows = read_rows(tmp_path / "found.jsonl")
    assert {(row["line"], row["change"], row["verdict"]) for row in rows} == {
        (2, "a if a > b else b -> b if a > b else a", "test_small.py::test_larger"),
        (2, "a > b -> a >= b", "survived"),  # of two equals either is the larger
        (6, "1 -> 2", "uncovered"),
        (10, "n > 0 -> n >= 0", "test_small.py::test_loops"),
        (10, "0 -> 1", "test_small.py::test_loops"),
        (11, "n -= 1 -> n += 1", "died"),
        (11, "1 -> 2", "test_small.py::test_loops"),
        (16, "3 -> 4", "uncovered"),  # test_once fails on the code as it is, and is left out
    }
    tool(*words)
    assert len(read_rows(tmp_path / "found.jsonl")) == len(rows)  # it goes on, not from the start
    report(rows)
    said = capsys.readouterr().out
    assert "5 of 8 killed: 62.5%" in said
    assert "survived  small.py:2  a > b -> a >= b" in said
