"""What a user waits for: ``workbench --help``, a cached run, a computed run, against imports.

Every command is started anew, in turn (interleaved rounds); medians and spread of wall time.

    python benchmarks/startup.py --rounds 5
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import OUT, Row, ratios, spread, write_record

BARE = "an interpreter that does nothing"
LIMITS = {"workbench run, computed": "import torch, transformers' GPT-2"}
"""What must be done at least; a command that is not named needs the bare interpreter."""


def commands(folder: Path) -> dict[str, list[str]]:
    """The commands by what they show; the cached run needs the store the warm-up fills."""
    python, workbench = [sys.executable, "-c"], [sys.executable, "-m", "workbench"]
    run = [*workbench, "run", "attention-sinks", "--model", "demo", "--data", "builtin:natural"]
    run += ["--n-pos", "64", "--json", "--store", str(folder)]
    return {
        BARE: [*python, "pass"],
        "import torch": [*python, "import torch"],
        "import torch, transformers' GPT-2": [*python, "from transformers import GPT2LMHeadModel"],
        "workbench --help": [*workbench, "--help"],
        "workbench results list": [*workbench, "results", "list", "--store", str(folder)],
        "workbench run, cached": run,
        "workbench run, computed": [*run, "--cache", "off"],
    }


def seconds(command: list[str]) -> float:
    """Wall time of one start; a command that fails is an error here."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "startup.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        each = commands(Path(folder))
        for command in each.values():
            seconds(command)
        times: dict[str, list[float]] = {name: [] for name in each}
        for _ in range(arguments.rounds):
            for name, command in each.items():
                times[name].append(seconds(command))
    base = times["import torch"]
    middle = {name: statistics.median(found) for name, found in times.items()}
    limits = {
        name: middle[LIMITS.get(name, BARE)] if "workbench" in name else None for name in times
    }
    for name, found in times.items():
        print(
            f"{name:36s} {middle[name]:6.2f} s ({min(found):.2f}-{max(found):.2f})"
            f"  x{ratios(found, base)['ratio']:.2f} of import torch"
        )
    write_record(
        "startup",
        [
            Row(
                name=name,
                peer="workbench" if "workbench" in name else "python",
                unit="s",
                **spread(found),
                **ratios(found, base),
                limit=(least := limits[name]),
                distance=middle[name] / least if least else None,
            )
            for name, found in times.items()
        ],
        command=f"python benchmarks/startup.py --rounds {arguments.rounds}",
        ratio_means="wall time over that of `import torch`",
        conditions=f"{arguments.rounds} rounds, every command in a process of its own",
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
