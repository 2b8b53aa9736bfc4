"""Run tests in a fork of a process that has imported and collected everything.

In the fork the code objects of some functions are exchanged before the tests run; what was imported
stays as it is, so a fault shows in calls, not in what a module did while it was imported. Such code,
outside functions, has no mutants.
"""

import os
import resource
import signal
from itertools import pairwise

from _pytest.runner import runtestprotocol

UNPLANTED = "unplanted"


class Forgetting:
    """Keeps Hypothesis from trying first what it found in another fork."""

    def pytest_sessionstart(self):
        """Set the profile before the tests, which take it over, are imported."""
        import hypothesis  # Not before pytest, which rewrites its assertions.

        hypothesis.settings.register_profile("mutation", database=None, deadline=None)
        hypothesis.settings.load_profile("mutation")


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
        if not passes(item, following):
            os.write(writer, item.nodeid.encode())
            return
    os.write(writer, b"survived")


def passes(item, following):
    """Whether a test runs to its end; a skipped one does not."""
    reports = runtestprotocol(item, log=False, nextitem=following)
    return len(reports) == 3 and all(report.passed for report in reports)
