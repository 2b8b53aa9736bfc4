"""Benchmarks are scripts that import the files beside them; tests load them as they run."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def benchmarks():
    """Inside, ``importlib.import_module("record")`` finds ``benchmarks/record.py``; nothing is left."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    kept = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path  # scripts put their own folder there as well
        for name in names & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(kept)
