"""Mutants drawn by a seed, and what the tests say to each."""

import gc
import json
import random
import sys
import time
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import coverage

from tests.mutation.forks import UNPLANTED, in_a_fork
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.tracing import import_libraries, read_tests


@dataclass(frozen=True)
class Bounds:
    """How much is spent on one mutant, in CPU seconds."""

    effort: float = 12.0
    """Tests are tried, the fastest first, while they take no longer than this together."""
    limit: float = 20.0
    """A fork that takes longer than this, and five times its tests' own time, has died."""


class Sampling:
    """Tries mutants drawn by a seed and appends the verdicts to a file."""

    def __init__(
        self, folder: Path, drawn: list[Mutant], output: Path, seconds: float, bounds: Bounds
    ):
        self.folder, self.drawn, self.output, self.bounds = folder, drawn, output, bounds
        self.until = time.monotonic() + seconds

    def pytest_runtestloop(self, session):
        """Take the place of pytest's loop."""
        known = read_tests(self.folder)
        self.seconds = {name: row["seconds"] for name, row in known.items()}
        self.items = {
            item.nodeid: item for item in session.items if known.get(item.nodeid, {}).get("passed")
        }
        self.sound = set()
        import_libraries(self.folder)
        self.lines = coverage.CoverageData(str(self.folder / "lines"))
        self.lines.read()
        functions = _live_functions()
        done = {(row["path"], row["number"]) for row in read_rows(self.output)}
        gc.freeze()
        for mutant in self.drawn:
            if (str(mutant.path), mutant.number) in done:
                continue
            if time.monotonic() > self.until:
                break
            self._note(mutant, _exchanges(mutant, functions))
        return True

    def _note(self, mutant, codes):
        start, through = time.monotonic(), self._through(mutant)
        row = {
            "path": str(mutant.path),
            "number": mutant.number,
            "line": mutant.first_line,
            "change": mutant.change,
            "verdict": UNPLANTED if codes is None else self._verdict(codes, through),
            "tests": len(through),
            "seconds": round(time.monotonic() - start, 1),
        }
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*row.values(), flush=True)

    def _through(self, mutant):
        """The tests that pass through a mutant's lines, the fastest first."""
        contexts = self.lines.contexts_by_lineno(str(mutant.path.absolute()))
        lines = range(mutant.first_line, mutant.last_line + 1)
        names = {name for line in lines for name in contexts.get(line, ()) if name in self.items}
        return sorted(names, key=lambda name: (self.seconds[name], name))

    def _verdict(self, codes, through):
        while names := self._within_effort(through):
            limit = self.bounds.limit + 5 * sum(self.seconds[name] for name in names)
            verdict = in_a_fork([self.items[name] for name in names], codes, limit)
            if verdict not in self.items or self._is_sound(verdict):
                return verdict
            print(f"{verdict} fails in a fork on the code as it is; it is left out", flush=True)
            del self.items[verdict]
            through = [name for name in through if name != verdict]
        return "uncovered"

    def _within_effort(self, through):
        chosen, spent = [], 0.0
        for name in through:
            spent += self.seconds[name]
            if chosen and spent > self.bounds.effort:
                break
            chosen.append(name)
        return chosen

    def _is_sound(self, name):
        """Whether a test passes in a fork on the code as it is."""
        if name not in self.sound and in_a_fork([self.items[name]], {}, 60) == "survived":
            self.sound.add(name)
        return name in self.sound


def draw(paths: Iterable[Path], count: int, seed: int) -> list[Mutant]:
    """Draw mutants without replacement, each one of all the paths' as likely as any other."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) or [path])]
    population = [mutant for file in files for mutant in mutants(file)]
    return random.Random(seed).sample(population, min(count, len(population)))


def read_rows(path: Path) -> list[dict]:
    """Return the verdicts of a sample so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
