"""Toy tasks: training steps and data against plain PyTorch loops, and 50 seeds against 50 runs.

The loops are in ``reference/``: the same model and batch, written as research code writes them.
Before anything is timed both train side by side and must have the same losses. Ours and theirs run
in turn in one process, on one thread; reported are medians over the rounds, of CPU time and of
its ratios, and the ratio of wall time beside them.

    python benchmarks/toy.py --rounds 7
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from race import per, race, rows_of, same
from record import OUT, Row, write_record
from reference import bigram_backcopy_loop, scan_snap_loop

from toy_tasks.bigram_backcopy import BigramBackcopyConfig, make_loss
from toy_tasks.bigram_batches import Batches
from toy_tasks.bigram_law import make_law, read_counts, sample
from toy_tasks.bigram_seeds import train_seeds
from toy_tasks.model import ToyModel, make_model
from toy_tasks.scan_snap_data import (
    Batch,
    ClassLaw,
    ScanSnapConfig,
    class_law,
    draw_batch,
    draw_sequences,
)
from toy_tasks.scan_snap_dynamics import Ascent, ascent, first_weights, forward, mean_loss
from toy_tasks.training import batch_generator, train

# Bigram-Backcopy


def bench_bigram(config: BigramBackcopyConfig, rounds: int) -> dict[str, Any]:
    """Ours is ``train`` itself, with its log and its file to resume from, but few checkpoints."""
    law, rng = make_law(read_counts()), bigram_backcopy_loop.make_rng(0)
    size, steps = (config.batch_size, config.n_pos), config.steps
    drawn = Batches(law, size, (config.seed,))
    batches = [drawn.at(step)[0] for step in range(steps)]

    def ours() -> ToyModel:
        model = make_model(config.model(law.d_vocab), 0)
        with TemporaryDirectory() as folder:
            train(model, make_loss(law, config), config.training(), Path(folder))
        return model

    def theirs(given: bool) -> bigram_backcopy_loop.Transformer:
        plain = bigram_backcopy_loop.with_weights_of(make_model(config.model(law.d_vocab), 0))
        its = bigram_backcopy_loop.optimizer_of(plain, config.lr, config.weight_decay)
        for batch in batches:
            drawn = batch if given else bigram_backcopy_loop.generate(law, *size, rng)
            bigram_backcopy_loop.step(plain, its, drawn)
        return plain

    def our_data() -> None:
        fresh = Batches(law, size, (config.seed,))
        for step in range(steps):
            fresh.at(step)

    tokens = batches[0][:, :-1]
    same(ours()(tokens).logits, theirs(True)(tokens)[0], "bigram-backcopy")
    data = race(our_data, lambda: bigram_backcopy_loop.generate(law, *size, rng), rounds)
    given = race(ours, lambda: theirs(True), rounds)
    return {
        "training step, data included": per(
            race(ours, lambda: theirs(False), rounds), steps, steps
        ),
        "training step, theirs given its data": per(given, steps, steps),
        "data (tokens)": per(data, steps, 1, size[0] * size[1]),
    }


# Scan and snap


def scan_snap_ours(config: ScanSnapConfig, law: ClassLaw) -> tuple[Callable[[Batch], float], Any]:
    """Our run in float64, in parts: what learns from a batch and returns its loss, and what draws one."""
    weights = first_weights(config, config.seed, torch.float64)
    rate = torch.tensor([config.lr_z], dtype=torch.float64)
    climb = Ascent(config.optimizer, (rate * config.lr_ratio, rate), config.momentum)
    moments, done = climb.start(weights), [0]

    def step(batch: Batch) -> float:
        attended = forward(weights, batch)
        loss = mean_loss(attended, batch).item()
        climb.step(weights, moments, ascent(weights, batch, attended), done[0])
        done[0] += 1
        return loss

    def draw(step: int) -> Batch:
        size = (config.batch_size, config.n_pos - 1)
        return draw_batch(law, size, [batch_generator(config.seed, step)])

    return step, draw


def bench_scan_snap(config: ScanSnapConfig, rounds: int, steps: int) -> dict[str, Any]:
    """Ours against the loop; both learn from the same eight batches first and must have the same losses."""
    law = class_law(config)
    size = (config.batch_size, config.n_pos - 1)
    our_step, draw = scan_snap_ours(config, law)
    plain = scan_snap_loop.Model(config.n_tokens, config.n_context)
    its = scan_snap_loop.optimizer_of(plain, config)
    drawn = [draw_sequences(law, size, batch_generator(config.seed, step)) for step in range(8)]
    given = [(row[:, :-1], row[:, -1] - config.n_context, target) for row, target in drawn]
    found = [our_step(draw(step)) for step in range(8)]
    same(found, [scan_snap_loop.step(plain, its, *batch)[0] for batch in given], "scan-snap")
    rng = scan_snap_loop.make_rng(0)

    def ours() -> None:
        for step in range(steps):
            our_step(draw(step))

    def theirs() -> None:
        for _ in range(steps):
            scan_snap_loop.step(plain, its, *scan_snap_loop.generate(law, *size, rng))

    def theirs_given() -> None:
        for step in range(steps):
            scan_snap_loop.step(plain, its, *given[step % 8])

    def our_data() -> None:
        for step in range(steps):
            draw(step)

    def their_data() -> None:
        for _ in range(steps):
            scan_snap_loop.generate(law, *size, rng)

    data = race(our_data, their_data, rounds)
    return {
        "training step, data included": per(
            race(ours, theirs, rounds, torch.float64), steps, steps
        ),
        "training step, theirs given its data": per(
            race(ours, theirs_given, rounds, torch.float64), steps, steps
        ),
        "data (tokens)": per(data, steps, steps, size[0] * size[1]),
    }


# Fifty seeds


def bench_seeds(config: BigramBackcopyConfig, rounds: int) -> dict[str, Any]:
    """All seeds in one batch against bare training loops one after another, nothing recorded."""
    seeds = tuple(range(50))
    law = make_law(read_counts())

    def one_run(seed: int) -> float:
        """Train one seed as a bare loop does; returns its last loss in nats."""
        model = make_model(config.model(law.d_vocab), seed)
        groups = [
            {
                "params": [w for w in model.parameters() if (w.ndim >= 2) == decays],
                "weight_decay": config.weight_decay * decays,
            }
            for decays in (True, False)
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
        loss_at = make_loss(law, replace(config, seed=seed))
        for step in range(config.steps):
            optimizer.zero_grad()
            loss = loss_at(model, step, batch_generator(seed, step))
            loss.backward()
            optimizer.step()
        return loss.item()

    def one_after_another() -> list[float]:
        return [one_run(seed) for seed in seeds]

    together = train_seeds(config, seeds).loss[-1].tolist()
    same(together, one_after_another(), "seeds")
    return race(lambda: train_seeds(config, seeds), one_after_another, rounds)


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "bigram-backcopy, width 16 (8 x 32)": lambda rounds: bench_bigram(
        BigramBackcopyConfig(
            d_model=16, n_pos=32, batch_size=8, steps=64, checkpoints_per_doubling=0.1
        ),
        rounds,
    ),
    "bigram-backcopy, defaults (32 x 64, width 64)": lambda rounds: bench_bigram(
        BigramBackcopyConfig(steps=32, checkpoints_per_doubling=0.1), rounds
    ),
    "bigram-backcopy, 512 x 256 data, width 64": lambda rounds: {
        "data (tokens)": bench_bigram_data(512, 256, rounds)
    },
    "scan-snap, small set (128 x 128)": lambda rounds: bench_scan_snap(
        ScanSnapConfig(), rounds, 20
    ),
    "50 seeds, width 16, 8 x 32, 40 steps": lambda rounds: {
        "whole sweep": bench_seeds(
            BigramBackcopyConfig(d_model=16, n_pos=32, batch_size=8, steps=40, n_held_out=4),
            min(rounds, 3),
        )
    },
}


def bench_bigram_data(n_rows: int, n_pos: int, rounds: int) -> dict[str, Any]:
    """The batch of the paper: 131,072 tokens."""
    law, rng = make_law(read_counts()), bigram_backcopy_loop.make_rng(0)
    found = race(
        lambda: sample(law, n_rows, n_pos, batch_generator(0, 0)),
        lambda: bigram_backcopy_loop.generate(law, n_rows // 16, n_pos, rng),
        rounds,
    )
    return per(found, 16, 1, n_rows * n_pos // 16)


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "toy.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for case, bench in CASES.items():
        if arguments.only and arguments.only not in case:
            continue
        print(case)
        for name, found in bench(arguments.rounds).items():
            rows += rows_of(f"{case}: {name}", found, arguments.threads)
            ours = rows[-2]
            spread = f"[{ours.ratio_least:.1f}, {ours.ratio_most:.1f}]"
            print(f"  {name:40s} x{ours.ratio:.1f} {spread}, {ours.note}", flush=True)
    write_record(
        "toy",
        rows,
        command=f"python benchmarks/toy.py --rounds {arguments.rounds}",
        ratio_means="how many times faster than the plain loop, by CPU time",
        better="higher",
        conditions=f"{arguments.rounds} rounds in turn, in one process",
        packages=("torch", "numpy"),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
