"""Every benchmark, one after the other, each in a process of its own; then the page: what ``make bench`` does.

A benchmark without options measures the whole of its table into ``benchmarks/out/``. One that fails does not
stop the others, and one that lacks something here (a GPU, files) leaves the kept numbers as they are; both are
named at the end. A run that was stopped goes on with the benchmark it was in. At the end the numbers replace
the kept ones, and the pages and pictures (which need Chromium) are drawn from them.

    python benchmarks/everything.py
    python benchmarks/everything.py capture papers      # these alone
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from record import NOT_HERE, OUT

HERE = Path(__file__).parent
OTHERS = ("everything", "render", "agreement")
"""Scripts that are no benchmarks: this one, and the two that draw the pages."""


def benchmarks() -> list[str]:
    """Names of all that can be run, in the order of the alphabet."""
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem not in OTHERS and "__main__" in path.read_text(encoding="utf-8")
    )


def run(*line: str) -> int:
    """Run one script of this folder to its end; its exit code."""
    return subprocess.run([sys.executable, str(HERE / line[0]), *line[1:]], check=False).returncode


def ended() -> list[str]:
    """Names of what has ended and is not adopted."""
    notes = OUT / "ended.txt"
    return notes.read_text(encoding="utf-8").split() if notes.exists() else []


def measure(names: Sequence[str]) -> list[str]:
    """Run the benchmarks that have not ended yet; the names of those that failed."""
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, name in enumerate(names, 1):
        if name in ended():
            say(f"{name} ({number} of {len(names)}): measured before this run was stopped")
            continue
        say(f"{name} ({number} of {len(names)})")
        start = time.monotonic()
        code = run(f"{name}.py")
        seconds = time.monotonic() - start
        if code == NOT_HERE:
            say(f"{name}: left out, see above; what is kept of it stays")
        elif code:
            say(f"{name}: failed with exit code {code} after {seconds:.0f} s")
            failed.append(name)
        else:
            say(f"{name}: {seconds:.0f} s")
            with (OUT / "ended.txt").open("a", encoding="utf-8") as file:
                file.write(name + "\n")
    return failed


def say(text: str) -> None:
    """Progress is said beside what the benchmarks print."""
    print(f"== {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, adopt, draw; 1 where something failed, 130 where it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*benchmarks(), []], help="default: all")
    names = parser.parse_args().names or benchmarks()
    try:
        failed = measure(names)
        pages = [("agreement.py",), ("render.py", "--figures")]
        if ended():  # of a benchmark that failed nothing is kept
            pages[1] += ("--adopt", *ended())
        failed += [line[0] for line in pages if run(*line)]
    except KeyboardInterrupt:
        say("stopped; what has ended is in benchmarks/out, and the same command goes on after it")
        return 130
    if failed:
        say(f"failed: {', '.join(failed)}; the others are measured and kept")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
