"""ACT's head filter: the margin race and the exact race against one head at a time on whole passes.

The naive search runs every head of every layer on every question, in batches, with the workbench's own
edit, so that nothing but the search differs. Work is counted in layer-forwards (one question through one
block; a part of a block as the share of its positions and of its matrices); CPU time is beside it. All
must choose the same heads, or the script fails. Questions that do not fit the model are left out and
counted. What has been measured is kept by layer beside the output, so that a long case can be run in
parts; a case whose parts are all there goes into the output, in the place of what stood there for it:

    python benchmarks/head_filter.py
    python benchmarks/head_filter.py --shared ../shared --case "demo agnews 400" --seconds 200
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from record import OUT, Row, not_here, read_record, write_record

CASES = {
    "demo sst2 900": ("demo", "sst2", "sst2_train.jsonl", 900),
    "demo agnews 400": ("demo", "agnews", "agnews_test.jsonl", 400),
    "demo sst2 100": ("demo", "sst2", "sst2_train.jsonl", 100),
    "stories260K sst2 300": ("models/stories260K", "sst2", "sst2_train.jsonl", 300),
}
"""Model, task, file of questions and how many of them, by name."""
WHOLE = ("demo sst2 100", "demo sst2 900")
"""What is measured without options: minutes; the others take the better part of an hour."""
SHARED = Path(__file__).parents[2] / "shared"
NAIVE = "one head at a time"
WAYS = (NAIVE, "workbench, race=exact", "workbench, race=margin")
BATCH_SIZE = 16


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


Part = dict[str, Any]
"""``kept`` (heads), ``layer_forwards`` and ``seconds`` of CPU; of the stock model ``right`` as well."""


def parts_of(model: Any, questions: list[Any]) -> dict[str, Callable[[dict[str, Part]], Part]]:
    """What is measured at once, by name; each is told the parts before it."""
    from workbench.calibration.effects import Work, stock_answers
    from workbench.calibration.race import filter_heads
    from workbench.calibration.settings import Run
    from workbench.interventions.act import ACT

    layers = range(model.spec.n_layers)

    def right(work: Work) -> int:
        return int((stock_answers(model, questions, BATCH_SIZE, work).margin > 0).sum())

    def stock(before: dict[str, Part]) -> Part:
        work = Work()
        return {"right": right(work), "kept": [], "layer_forwards": work.layer_forwards}

    def naive(layer: int, before: dict[str, Part]) -> Part:
        work, kept = Work(), []
        for head in range(model.spec.n_heads):
            with model.edit(ACT(heads=((layer, head),))):
                if right(work) > before[f"{NAIVE}, stock"]["right"]:
                    kept.append([layer, head])
        return {"kept": kept, "layer_forwards": work.layer_forwards}

    def race(reach: float | None, before: dict[str, Part]) -> Part:
        race, _, work = filter_heads(model, questions, ACT(), layers, Run(BATCH_SIZE), reach=reach)
        return {"kept": [list(head) for head in race.kept()], "layer_forwards": work.layer_forwards}

    by_layer = {f"{NAIVE}, layer {layer}": partial(naive, layer) for layer in layers}
    races = {WAYS[1]: partial(race, None), WAYS[2]: partial(race, 2.0)}
    return {f"{NAIVE}, stock": stock, **by_layer, **races}


def parts_file(case: str) -> Path:
    """Where the parts of a case are kept until all are there."""
    return OUT / "head_filter" / f"{case}.json"


def measure_case(case: str, shared: Path, until: float) -> list[Row]:
    """Measure the parts that are still missing; the rows of the case, none while some are."""
    import workbench as wb

    path, task, data, limit = CASES[case]
    model = wb.load("demo" if path == "demo" else str(shared / "data" / path))
    questions, n_long = questions_of(model, task, shared / "data" / "tasks" / data, limit)
    file = parts_file(case)
    file.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Part] = json.loads(file.read_text()) if file.exists() else {}
    for name, measure in parts_of(model, questions).items():
        if name in done:
            continue
        if time.monotonic() > until:
            return []
        start = time.process_time()
        part = measure(done)
        done[name] = {**part, "seconds": time.process_time() - start}
        file.write_text(json.dumps(done, indent=1) + "\n")
    shape = f"{model.spec.n_layers} layers of {model.spec.n_heads} heads"
    about = f"{model.spec.name}, {task}, {len(questions)} questions"
    return rows_of(about, shape, done, f"; {n_long} questions too long" if n_long else "")


def rows_of(name: str, shape: str, done: dict[str, Part], note: str) -> list[Row]:
    """Every way of one case; refuses ways that do not choose alike."""
    totals = {
        way: {
            key: sum((part[key] for part in parts), start=type(parts[0][key])())
            for key in ("kept", "layer_forwards", "seconds")
        }
        for way in WAYS
        if (parts := [part for of, part in done.items() if of.startswith(way)])
    }
    rows, first = [], totals[NAIVE]
    for way, found in totals.items():
        if found["kept"] != first["kept"]:
            raise SystemExit(f"{name}: {way} keeps {found['kept']}, {NAIVE} {first['kept']}")
        saved = first["layer_forwards"] / found["layer_forwards"]
        cpu = first["seconds"] / found["seconds"]
        kept = ", ".join(f"L{layer}H{head}" for layer, head in found["kept"]) or "none"
        print(f"{name}: {way}: {saved:.1f}x fewer; CPU {cpu:.1f}x; keeps {kept}", flush=True)
        rows.append(
            Row(
                name=name,
                peer=way,
                shape=shape,
                median=found["layer_forwards"],
                unit="layer-forwards",
                ratio=saved,
                cpu_ratio=cpu,
                note=f"keeps {kept}; {found['seconds']:.0f} CPU s{note}",
            )
        )
    return rows


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help="holds data/tasks, data/models")
    parser.add_argument(
        "--case", action="append", choices=CASES, help=f"repeat; default: {', '.join(WHOLE)}"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part later")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "head_filter.json")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    if not (arguments.shared / "data" / "tasks").is_dir():
        not_here(f"{arguments.shared} must hold data/tasks, which is not there; give --shared")
    for case in arguments.case or WHOLE:
        new = measure_case(case, arguments.shared, until)
        if not new:
            raise SystemExit(f"{case}: not all parts are measured; run it again to go on")
        old = read_record(arguments.output)["rows"] if arguments.output.exists() else []
        write_record(
            "head_filter",
            [row for row in old if row.name != new[0].name] + new,
            command="python benchmarks/head_filter.py",
            ratio_means="how many times fewer layer-forwards than one head at a time",
            better="higher",
            conditions="one round, batches of 16, one thread; cases in runs of their own",
            path=arguments.output,
        )
        parts_file(case).unlink()


if __name__ == "__main__":
    main()
