"""The papers' own procedures, written anew in ``reference/``, against the workbench's.

For each, both run in turn in one process, on one thread, and must find the same numbers before anything is
timed. What is measured elsewhere is not repeated: ablations (``ablation.py``), attacks and searches
(``attacks.py``), toy training (``toy.py``), ZeroTuning and generation (``generate.py``).

    python benchmarks/papers.py --rounds 5
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from papers_cases import CASES, Case
from race import ENDS, limit_of, race, same
from record import OUT, Row, write_record


def check(case: Case) -> None:
    """Refuse to compare two ways that do not find the same numbers."""
    for ours, theirs in zip(case.ours(), case.theirs(), strict=True):
        same(ours, theirs, case.name)


def rows_of(case: Case, found: dict[str, Any]) -> list[Row]:
    """Ours and the paper's."""
    about = {
        "name": case.name,
        "shape": case.shape,
        "threads": torch.get_num_threads(),
        "unit": "CPU s",
    }
    # ``race`` divides CPU times; the ratio of wall times is in the note.
    ratio = {f"ratio{end}": found[f"ratio{old}"] for end, old in ENDS}
    note = f"by wall time {found['wall_ratio']:.3g}" + (f"; {case.note}" if case.note else "")
    theirs = {"peer": "the paper's procedure", "median": found["theirs_s"], "ratio": 1.0}
    return [
        Row(
            **about,
            peer="workbench",
            median=found["ours_s"],
            **ratio,
            **limit_of(found, "ours"),
            peak_memory=found["ours_mb"],
            note=note,
        ),
        Row(**about, **theirs, **limit_of(found, "theirs"), peak_memory=found["theirs_mb"]),
    ]


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "papers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with torch.no_grad():
        for name in arguments.cases or CASES:
            case = CASES[name]()
            check(case)
            rows += rows_of(case, race(case.ours, case.theirs, arguments.rounds, case.dtype))
            ours = rows[-2]
            print(
                f"{case.name}: {ours.ratio:.3g} [{ours.ratio_least:.3g}, {ours.ratio_most:.3g}] times, "
                f"{ours.median:.3g} CPU s",
                flush=True,
            )
    write_record(
        "papers",
        rows,
        command=f"python benchmarks/papers.py --rounds {arguments.rounds}",
        ratio_means="how many times faster than the paper's procedure, by CPU time",
        better="higher",
        conditions=f"{arguments.rounds} interleaved rounds after one that is not counted; random weights",
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
