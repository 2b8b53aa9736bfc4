"""Run tests on mutants, each in a fork of one process that has imported and collected everything.

Pytest plugins that take the place of its loop over the tests: ``Tracing`` notes which test passes
through which line, ``Sampling`` tries mutants. In a fork the code object of the mutated function is
exchanged before the tests run; what was imported stays as it is, so a fault shows in calls, not in
what a module did while it was imported. Such code, outside functions, has no mutants.
"""

import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import coverage
from _pytest.runner import runtestprotocol

from tests.mutation.mutants import Mutant, mutants

UNPLANTED = "unplanted"


class Forgetting:
    """Keeps Hypothesis from trying first what it found in another fork."""

    def pytest_sessionstart(self):
        """Set the profile before the tests, which take it over, are imported."""
        import hypothesis  # Not before pytest, which rewrites its assertions.

        hypothesis.settings.register_profile("mutation", database=None, deadline=None)
        hypothesis.settings.load_profile("mutation")


class Tracing:
    """Runs the tests that are not in the map yet and notes the lines they pass through."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.until = folder, time.monotonic() + seconds

    def pytest_runtestloop(self, session):
        """Take the place of pytest's loop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = read_tests(self.folder)
        left = [item for item in session.items if item.nodeid not in known]
        here = Path.cwd()
        tracer = coverage.Coverage(
            data_file=self.folder / "lines",
            include=[f"{here}/*"],
            omit=[f"{here}/tests/*", f"{here}/.venv/*"],
            config_file=False,
        )
        tracer.load()
        tracer.start()
        for item, following in pairwise([*left, None]):
            if time.monotonic() > self.until:
                break
            tracer.switch_context(item.nodeid)
            start = time.process_time()
            passed = _passes(item, following)
            seconds = time.process_time() - start
            if not passed:
                # A compiler may refuse to work while it is traced.
                passed = in_a_fork([item], {}, 120) == "survived"
            known[item.nodeid] = {"seconds": round(seconds, 3), "passed": passed}
        tracer.stop()
        tracer.save()
        (self.folder / "tests.json").write_text(json.dumps(known, indent=0))
        note_libraries(self.folder)
        print(f"{len(known)} of {len(session.items)} tests are in the map", flush=True)
        return True


class Sampling:
    """Tries mutants drawn by a seed; verdicts are appended to ``sample-SEED.jsonl``."""

    def __init__(
        self, folder: Path, drawn: list[Mutant], output: Path, seconds: float, limit: float
    ):
        self.folder, self.drawn, self.output, self.limit = folder, drawn, output, limit
        self.until = time.monotonic() + seconds

    def pytest_runtestloop(self, session):
        """Take the place of pytest's loop."""
        known = read_tests(self.folder)
        items = {item.nodeid: item for item in session.items}
        passing = {name: items[name] for name in items if known.get(name, {}).get("passed")}
        import_libraries(self.folder)
        lines = coverage.CoverageData(str(self.folder / "lines"))
        lines.read()
        functions = _live_functions()
        done = {(row["path"], row["number"]) for row in read_rows(self.output)}
        gc.freeze()
        for mutant in self.drawn:
            path = str(mutant.path)
            if (path, mutant.number) in done:
                continue
            if time.monotonic() > self.until:
                break
            names = _tests_of(mutant, lines, known, passing)
            seconds = sum(known[name]["seconds"] for name in names)
            codes = _exchanges(mutant, functions)
            verdict, start = "uncovered", time.monotonic()
            if codes is None:
                verdict = UNPLANTED
            elif names:
                verdict = in_a_fork(
                    [passing[name] for name in names], codes, self.limit + 5 * seconds
                )
            if verdict in passing and in_a_fork([passing[verdict]], {}, 60) != "survived":
                raise RuntimeError(f"{verdict} fails on the code as it is; mend it first")
            row = {
                "path": path,
                "number": mutant.number,
                "line": mutant.first_line,
                "change": mutant.change,
                "verdict": verdict,
                "tests": len(names),
                "seconds": round(time.monotonic() - start, 1),
            }
            with self.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*row.values(), flush=True)
        return True


def draw(paths: Iterable[Path], count: int, seed: int) -> list[Mutant]:
    """Draw mutants without replacement, each one of all the paths' as likely as any other."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) or [path])]
    population = [mutant for file in files for mutant in mutants(file)]
    return random.Random(seed).sample(population, min(count, len(population)))


def read_tests(folder: Path) -> dict[str, dict]:
    """Return the tests of the map: CPU seconds of each and whether it passed."""
    path = folder / "tests.json"
    return json.loads(path.read_text()) if path.exists() else {}


def note_libraries(folder: Path) -> None:
    """Add what has been imported, apart from the project itself, to the map's list."""
    path, here = folder / "libraries.json", f"{Path.cwd()}/"
    before = json.loads(path.read_text()) if path.exists() else []
    found = [
        name
        for name, module in list(sys.modules.items())
        if not str(getattr(module, "__file__", None) or here).startswith(here)
    ]
    path.write_text(json.dumps(sorted({*before, *found}), indent=0))


def import_libraries(folder: Path) -> None:
    """Import what the tests imported while they ran, so that no fork has to: seconds each."""
    path = folder / "libraries.json"
    for name in json.loads(path.read_text()) if path.exists() else ():
        # Some cannot be imported by their own name, and some warn.
        with warnings.catch_warnings(action="ignore"), suppress(Exception):
            importlib.import_module(name)


def read_rows(path: Path) -> list[dict]:
    """Return the verdicts of a sample so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def in_a_fork(items: list, codes: dict, cpu_seconds: float) -> str:
    """Run tests in a fork with other code in some functions.

    Returns:
        The name of the test that failed first, ``survived``, ``unplanted`` where a function cannot
        take its new code, or ``died``: the fork ran out of its time or was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _run_and_tell(items, codes, cpu_seconds, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told or "died"


def _run_and_tell(items, codes, cpu_seconds, writer):
    os.setsid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.set_inheritable(writer, False)
    limit = int(cpu_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    signal.alarm(20 * limit)  # For what waits and does not compute.
    try:
        for function, code in codes.items():
            function.__code__ = code
    except ValueError:  # A name of the outer scope is no longer used.
        os.write(writer, UNPLANTED.encode())
        return
    for item, following in pairwise([*items, None]):
        if not _passes(item, following):
            os.write(writer, item.nodeid.encode())
            return
    os.write(writer, b"survived")


def _passes(item, following):
    """Whether a test runs to its end; a skipped one does not."""
    reports = runtestprotocol(item, log=False, nextitem=following)
    return len(reports) == 3 and all(report.passed for report in reports)


def _tests_of(mutant, lines, known, passing, effort=12.0):
    """The tests that pass through a mutant's lines, fastest first, up to some CPU seconds."""
    contexts = lines.contexts_by_lineno(str(mutant.path.absolute()))
    names = {
        name
        for line in range(mutant.first_line, mutant.last_line + 1)
        for name in contexts.get(line, ())
        if name in passing
    }
    chosen = []
    for name in sorted(names, key=lambda name: (known[name]["seconds"], name)):
        effort -= known[name]["seconds"]
        if effort < 0 and chosen:
            break
        chosen.append(name)
    return chosen


def _live_functions():
    """Every function there is, by file and qualified name."""
    found = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType:  # isinstance would ask proxies for their class
            found[thing.__code__.co_filename, thing.__code__.co_qualname].append(thing)
    return found


def _exchanges(mutant, functions):
    """The new code of each function object that a mutant changes, or None where it has none."""
    file = str(mutant.path.absolute())
    (module,) = [
        module for module in list(sys.modules.values()) if getattr(module, "__file__", 0) == file
    ] or [None]
    if module is None:
        return None
    # The module's own loader: it puts the checks of shapes in as it did when it was imported.
    compiled = module.__loader__.source_to_code(mutant.source().encode(), file)
    codes = [code for code in _codes(compiled) if code.co_qualname == mutant.function]
    live = defaultdict(list)
    for function in functions[file, mutant.function]:
        live[function.__code__.co_firstlineno].append(function)
    if len(live) != len(codes):
        return None
    return {
        function: code
        for line, code in zip(sorted(live), codes, strict=True)
        for function in live[line]
    }


def _codes(code) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)
