"""ACT's head filter: the race and the exact race against one head at a time on whole passes.

The naive search runs every head of every layer on every question, in batches, with the workbench's own
edit, so that nothing but the search differs. Work is counted in layer-forwards (one question through one
block); CPU time is beside it, because rows of single heads are edited in tiles and cost more than stock
ones. All three must choose the same heads, or the script fails. Questions that do not fit the model are
left out and counted.

    python benchmarks/head_filter.py --model demo --data sst2_train.jsonl --task sst2 --limit 200
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import OUT, Row, write_record


def questions_of(model: Any, arguments: argparse.Namespace) -> tuple[list[Any], int]:
    """Encoded questions that fit, and how many did not."""
    from workbench.errors import DataError
    from workbench.evaluation.scoring import Settings, encode_questions
    from workbench.evaluation.task import find_task, read_questions

    fitting, n_long = [], 0
    for question in read_questions(find_task(arguments.task), arguments.data):
        try:
            fitting += encode_questions(model, [question], Settings())
        except DataError:
            n_long += 1
        if len(fitting) == arguments.limit:
            break
    return fitting, n_long


def naive(model: Any, questions: list[Any], batch_size: int) -> tuple[list[Any], int]:
    """Heads that one whole pass a head keeps, and layer-forwards."""
    from workbench.calibration.effects import Work, stock_answers
    from workbench.interventions.act import ACT

    work = Work()
    stock = int((stock_answers(model, questions, batch_size, work).margin > 0).sum())
    kept = []
    for layer in range(model.spec.n_layers):
        for head in range(model.spec.n_heads):
            with model.edit(ACT(heads=((layer, head),))):
                after = stock_answers(model, questions, batch_size, work).margin > 0
            if int(after.sum()) > stock:
                kept.append((layer, head))
    return kept, work.layer_forwards


def race(
    model: Any, questions: list[Any], batch_size: int, reach: float | None
) -> tuple[list[Any], int]:
    """The same by a race."""
    from workbench.calibration.race import filter_heads
    from workbench.calibration.settings import Run
    from workbench.interventions.act import ACT

    layers = range(model.spec.n_layers)
    found, _, work = filter_heads(model, questions, ACT(), layers, Run(batch_size), reach=reach)
    return list(found.kept()), work.layer_forwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "head_filter.json")
    arguments = parser.parse_args()
    import workbench as wb

    model = wb.load(arguments.model)
    questions, n_long = questions_of(model, arguments)
    size = arguments.batch_size
    ways: dict[str, Callable[[], tuple[list[Any], int]]] = {
        "one head at a time": lambda: naive(model, questions, size),
        "workbench, race=exact": lambda: race(model, questions, size, None),
        "workbench, race=margin": lambda: race(model, questions, size, 2.0),
    }
    name = f"{model.spec.name}, {arguments.task}, {len(questions)} questions"
    rows, first = [], None
    for peer, way in ways.items():
        start = time.process_time()
        kept, n_blocks = way()
        seconds = time.process_time() - start
        first = first or (kept, n_blocks, seconds)
        assert kept == first[0], f"{peer} keeps {kept}, the naive search {first[0]}"
        saved, cpu = first[1] / n_blocks, first[2] / seconds
        print(
            f"{name}: {peer}: {n_blocks} layer-forwards, {saved:.1f}x fewer; CPU {cpu:.1f}x; keeps {kept}",
            flush=True,
        )
        measured = {"median": float(n_blocks), "unit": "layer-forwards", "ratio": saved}
        rows.append(
            Row(name=name, peer=peer, cpu_ratio=cpu, note=f"keeps {len(kept)} heads", **measured)
        )
    write_record(
        "head_filter",
        rows,
        command=f"python benchmarks/head_filter.py --task {arguments.task} --limit {arguments.limit}",
        ratio_means="how many times fewer layer-forwards than one head at a time",
        better="higher",
        conditions=f"{n_long} questions were too long and left out; one round",
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
