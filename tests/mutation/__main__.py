"""Which small faults in our code would the tests notice? A sample of them, and the share noticed.

    python -m tests.mutation map tests/attention tests/interventions -o mutation
    python -m tests.mutation sample workbench/attention workbench/interventions --of mutation -n 100
    python -m tests.mutation report mutation

``map`` runs the tests once and notes which of them pass through which line. ``sample`` draws mutants
(``mutants.py``) by a seed and runs, for each, the tests that pass through its line, the fastest first,
until one fails. Both stop after ``--seconds`` and go on where they were when they are called again.

Why not a tool that exists: mutmut puts trampolines into the modules as they are imported and so gets
none of those that jaxtyping's own import hook rewrites; cosmic-ray starts a new interpreter for each
mutant, which here means importing torch, transformers and all tests: 12 s of CPU a mutant before the
first test runs. Here the tests are collected once; a mutant is a fork of that process in which
the code of one function is exchanged, and nothing on disk is touched.
"""

import argparse
import collections
import os
import sys
from pathlib import Path

import pytest

from tests.mutation.forks import Forgetting
from tests.mutation.sampling import Bounds, Sampling, draw, read_rows
from tests.mutation.tracing import Tracing, read_tests

OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu and not browser"]


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    mapping = verbs.add_parser("map", help="note which tests pass through which line")
    mapping.add_argument("tests", nargs="+")
    mapping.add_argument("-o", "--output", type=Path, required=True)
    sampling = verbs.add_parser("sample", help="try mutants")
    sampling.add_argument("code", nargs="+", type=Path)
    sampling.add_argument("--of", type=Path, required=True, help="the folder of the map")
    sampling.add_argument("-n", type=int, default=100)
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl")
    sampling.add_argument(
        "--effort", type=float, default=12.0, help="CPU seconds of tests for one mutant"
    )
    sampling.add_argument(
        "--limit", type=float, default=20.0, help="CPU seconds of a fork, at least"
    )
    for verb in (mapping, sampling):
        verb.add_argument("--seconds", type=float, default=200.0)
    reporting = verbs.add_parser("report", help="the share of mutants that were noticed")
    reporting.add_argument("samples", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "report":
        report([row for path in arguments.samples for row in read_rows(path)])
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # A fork has none of its parent's threads.
    if arguments.verb == "map":
        plugin, tests = Tracing(arguments.output, arguments.seconds), arguments.tests
    else:
        drawn = draw(arguments.code, arguments.n, arguments.seed)
        bounds = Bounds(arguments.effort, arguments.limit)
        plugin = Sampling(arguments.of, drawn, arguments.output, arguments.seconds, bounds)
        tests = sorted({name.split("::")[0] for name in read_tests(arguments.of)})
    return pytest.main([*OPTIONS, *tests], plugins=[plugin, Forgetting()])


def report(rows):
    """Print the share of mutants that a test noticed, and every one that none did."""
    missed = ("survived", "uncovered")
    tried = [row for row in rows if row["verdict"] != "unplanted"]
    killed = sum(row["verdict"] not in missed for row in tried)
    for row in tried:
        if row["verdict"] in missed:
            print(f"{row['verdict']:9s} {row['path']}:{row['line']}  {row['change']}")
    low, high = wilson(killed, len(tried))
    counts = collections.Counter(
        "killed" if row["verdict"] not in missed else row["verdict"] for row in tried
    )
    print(
        f"{killed} of {len(tried)} killed: {killed / len(tried):.1%} [{low:.1%}, {high:.1%}]",
        dict(counts),
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share, 95 % by default."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return centre - half, centre + half


if __name__ == "__main__":
    sys.exit(main())
