"""Which tests pass through which line, and what they import."""

import importlib
import json
import sys
import time
import warnings
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import coverage

from tests.mutation.forks import in_a_fork, passes


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
            passed = passes(item, following)
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
