"""A worker process: cells come in as JSON lines on stdin, what happens goes out on stdout.

    python -m workbench.execute.worker STORE

It ends when stdin does, also when its parent was killed: an orphan goes on with nothing.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

REPORT_SECONDS = 0.2
"""Progress inside a cell is told no more often."""


def main() -> None:
    """Run cells until there are no more."""
    signal.signal(signal.SIGTERM, _terminate)
    _volunteer()
    # What a probe or a library prints must not get between the messages.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    from workbench.execute.cell import Cell, LoadedModel, run_cell, store_at
    from workbench.run import Reporter

    say = _speaker(channel)
    import torch  # noqa: F401 - the slow part of starting, done before "ready"

    store, loaded = store_at(sys.argv[1]), LoadedModel()
    say({"event": "ready"})
    try:
        while True:
            cell = Cell(**json.loads(lines.get()))
            reporter = Reporter(progress_of(cell.key, say))
            say({"event": "finished", **asdict(run_cell(cell, store, loaded, reporter))})
    except SystemExit:
        # Leases are given up by now; taking the libraries down in order would only take time.
        os._exit(0)


def progress_of(
    key: str, say: Callable[[dict[str, Any]], None], seconds: float = REPORT_SECONDS
) -> Callable[[int, int], None]:
    """A callback for progress that tells at most once in so many seconds."""
    last = -seconds

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            say({"event": "advanced", "cell": key, "done": done, "total": total})

    return progress


def _volunteer() -> None:
    """When memory runs out, Linux is to end a worker, which costs a cell, and not the sweep."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _terminate(signum: int, frame: FrameType | None) -> None:
    # An exception unwinds every ``with``: leases are given up, unfinished files removed.
    raise SystemExit(128 + signum)


def _listen(lines: "queue.Queue[str]") -> None:
    # Not sys.stdin: its lock, held by this thread, would abort the interpreter at its end.
    rest = b""
    while piece := os.read(0, 1 << 16):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    # The parent is done with us, or gone. Whatever is half done is not published; a lease of a
    # dead process is taken over.
    os._exit(0)


def _speaker(channel: TextIO) -> Callable[[dict[str, Any]], None]:
    from workbench.store.strict_json import to_json

    def say(message: dict[str, Any]) -> None:
        channel.write(to_json(message) + "\n")
        channel.flush()

    return say


if __name__ == "__main__":
    main()
