"""ACT's head filter: the margin race and the exact race against one head at a time on whole passes.

The naive search runs every head of every layer on every question, in batches, with the workbench's own
edit, so that nothing but the search differs. Work is counted in layer-forwards (one question through one
block; a part of a block as the share of its positions and of its matrices) and, from torch's own
operators, in multiplications, attention and unembedding included; CPU time is beside them. All three
must choose the same heads, or the script fails. Questions that do not fit the model are left out and
counted. Cases are added to what the output file holds, so that a long list can be run in parts:

    python benchmarks/head_filter.py --shared ../shared
    python benchmarks/head_filter.py --shared ../shared --case "demo sst2 900" --only "one head at a time"
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import OUT, Row, read_record, write_record

CASES = {
    "demo sst2 900": ("demo", "sst2", "sst2_train.jsonl", 900),
    "demo agnews 400": ("demo", "agnews", "agnews_test.jsonl", 400),
    "demo arc 400": ("demo", "arc", "arc_easy.jsonl", 400),
    "demo sst2 100": ("demo", "sst2", "sst2_train.jsonl", 100),
    "stories260K sst2 900": ("models/stories260K", "sst2", "sst2_train.jsonl", 900),
    "stories260K agnews 200": ("models/stories260K", "agnews", "agnews_test.jsonl", 200),
    "stories260K arc 200": ("models/stories260K", "arc", "arc_easy.jsonl", 200),
}
"""Model, task, file of questions and how many of them, by name."""
NAIVE = "one head at a time"
WAYS = (NAIVE, "workbench, race=exact", "workbench, race=margin")
BATCH_SIZE = 16


@dataclass(frozen=True)
class Found:
    """What one way kept and cost."""

    kept: list[tuple[int, int]]
    layer_forwards: float
    seconds: float


def questions_of(model: Any, task: str, data: Path, limit: int) -> tuple[list[Any], int]:
    """Encoded questions that fit, and how many did not."""
    from workbench.errors import DataError
    from workbench.evaluation.scoring import Settings, encode_questions
    from workbench.evaluation.task import find_task, read_questions

    fitting, n_long = [], 0
    for question in read_questions(find_task(task), data):
        try:
            fitting += encode_questions(model, [question], Settings())
        except DataError:
            n_long += 1
        if len(fitting) == limit:
            break
    return fitting, n_long


def naive(model: Any, questions: list[Any]) -> tuple[list[Any], float]:
    """Heads that one whole pass a head keeps, and layer-forwards."""
    from workbench.calibration.effects import Work, stock_answers
    from workbench.interventions.act import ACT

    work = Work()
    stock = int((stock_answers(model, questions, BATCH_SIZE, work).margin > 0).sum())
    kept = []
    for layer in range(model.spec.n_layers):
        for head in range(model.spec.n_heads):
            with model.edit(ACT(heads=((layer, head),))):
                after = stock_answers(model, questions, BATCH_SIZE, work).margin > 0
            if int(after.sum()) > stock:
                kept.append((layer, head))
    return kept, work.layer_forwards


def race(model: Any, questions: list[Any], reach: float | None) -> tuple[list[Any], float]:
    """The same by a race."""
    from workbench.calibration.race import filter_heads
    from workbench.calibration.settings import Run
    from workbench.interventions.act import ACT

    layers = range(model.spec.n_layers)
    found, _, work = filter_heads(model, questions, ACT(), layers, Run(BATCH_SIZE), reach=reach)
    return list(found.kept()), work.layer_forwards


def measured(way: Callable[[], tuple[list[Any], float]]) -> Found:
    """Run it once."""
    start = time.process_time()
    kept, n_blocks = way()
    return Found(kept, n_blocks, time.process_time() - start)


def multiplications(model: Any, questions: list[Any], way: str) -> float:
    """What torch's operators say that a way multiplies, in millions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        search(model, questions, way)()
    return counter.get_total_flops() / 2e6


def search(model: Any, questions: list[Any], way: str) -> Callable[[], tuple[list[Any], float]]:
    """One of ``WAYS``."""
    if way == NAIVE:
        return lambda: naive(model, questions)
    return lambda: race(model, questions, 2.0 if "margin" in way else None)


def rows_of(case: str, shared: Path, n_counted: int) -> list[Row]:
    """One case, every way; refuses ways that do not choose alike."""
    import workbench as wb

    path, task, data, limit = CASES[case]
    model = wb.load("demo" if path == "demo" else str(shared / "data" / path))
    questions, n_long = questions_of(model, task, shared / "data" / "tasks" / data, limit)
    spec = model.spec
    rows: list[Row] = []
    first = None
    for way in WAYS:
        found = measured(search(model, questions, way))
        first = first or found
        if found.kept != first.kept:
            raise SystemExit(f"{case}: {way} keeps {found.kept}, {NAIVE} {first.kept}")
        saved, cpu = first.layer_forwards / found.layer_forwards, first.seconds / found.seconds
        kept = ", ".join(f"L{layer}H{head}" for layer, head in found.kept) or "none"
        print(f"{case}: {way}: {saved:.1f}x fewer; CPU {cpu:.1f}x; keeps {kept}", flush=True)
        rows.append(
            Row(
                name=f"{spec.name}, {task}, {len(questions)} questions",
                peer=way,
                shape=f"{spec.n_layers} layers of {spec.n_heads} heads",
                median=found.layer_forwards,
                unit="layer-forwards",
                ratio=saved,
                cpu_ratio=cpu,
                note=f"keeps {kept}; {found.seconds:.0f} CPU s; {n_long} questions too long",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="holds data/tasks, data/models")
    parser.add_argument("--case", action="append", choices=CASES, help="repeat; default: all")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "head_filter.json")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for case in arguments.case or CASES:
        if arguments.output.exists():
            rows = read_record(arguments.output)["rows"]
        new = rows_of(case, arguments.shared, 0)
        rows = [row for row in rows if row.name != new[0].name] + new
        write_record(
            "head_filter",
            rows,
            command="python benchmarks/head_filter.py --shared ../shared",
            ratio_means="how many times fewer layer-forwards than one head at a time",
            better="higher",
            conditions="one round; cases in runs of their own; batches of 16",
            path=arguments.output,
        )


if __name__ == "__main__":
    main()
