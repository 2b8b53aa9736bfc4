"""A Llama-7B-shaped model on a GPU: reading all layers beside flash attention, decoding under an edit beside stock.

Random weights, bfloat16, made on the device. Read: the mean attention that every key receives, in all layers and
heads, against a forward pass whose attention is the flash kernel; aims: 1.3 times its time, 1.1 times its memory.
Decode: zerotuning on all heads against stock ``generate``; aim: 0.95 of its tokens a second. The ways take turns,
round by round, in one process. Before anything is timed, sinks must be those of eager attention's maps, and ways of
one edit must agree in their logits. (The file is not called after CUDA: torch imports a package of that name.)

    python benchmarks/gpu.py
    python benchmarks/gpu.py --lengths 2048 8192 --rounds 10
    python benchmarks/gpu.py --device cpu --shape tiny --lengths 64      # whether it runs
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import N_POS, check_edits, check_sinks
from gpu_methods import (
    DECODING,
    EAGER,
    KERNEL,
    SHAPES,
    Subject,
    Way,
    readers,
    too_large,
    ways,
)
from gpu_rows import PACKAGES, Found, decoding_rows, reading_rows
from on_device import clock_of, extra_mb, let_go, name_of, seconds_of
from peaks import Decoder, peak_bandwidth, peak_flops
from record import OUT, Row, not_here, write_record

from workbench.attention.column_kernel import why_not_here
from workbench.memory import free_memory_bytes

BATCHES = (1, 8)
TILES = (1 << 23, 1 << 27)
"""A quarter and four times what the workbench takes on CUDA, where no tile was ever measured."""


def measure(
    works: Mapping[str, tuple[Any, Any]], rounds: int, device: str, not_run: Mapping[str, str]
) -> dict[str, Found]:
    """Seconds of every round and the extra memory of a first run, by way; or why there are none.

    Args:
        works: By way, what is run for its memory, and what returns the seconds of a run.
        rounds: How often.
        device: Where.
        not_run: Ways that are not even tried, with the reason.
    """
    found: dict[str, Found] = {name: {"error": why} for name, why in not_run.items()}
    for name, (work, _) in works.items():
        if name not in found:
            try:
                found[name] = {"extra_mb": extra_mb(work, device), "seconds": []}
            except Exception as error:  # a way that fails is a row of the table
                found[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
                let_go(device)
    left = [name for name in works if "error" not in found[name]]
    for number in range(rounds):
        # Every other round backwards: what comes after what must not matter.
        for name in left[:: 1 if number % 2 == 0 else -1]:
            found[name]["seconds"].append(works[name][1]())
    return {name: found[name] for name in works}


def capture_rows(
    subject: Subject, n_pos: int, rounds: int, peak: tuple[float, float], tiles: Sequence[int]
) -> list[Row]:
    """All ways of reading a prompt, and what bounds the plain forward.

    Args:
        subject: The model.
        n_pos: Length of the prompt.
        rounds: How often.
        peak: Operations and bytes a second of the device.
        tiles: Sizes of tiles to try besides the workbench's own.
    """
    tokens, device = subject.tokens(1, n_pos), subject.device
    works = {
        name: (run := partial(read, tokens), partial(seconds_of, run, device))
        for name, read in readers(subject, list(tiles)).items()
    }
    let_go(device)
    not_run = {}
    if why := too_large(subject, n_pos):
        not_run[EAGER] = why
    if needed := why_not_here(device):
        not_run[KERNEL] = f"it needs {needed}"
    found = measure(works, rounds, device, not_run)
    return reading_rows(subject, n_pos, found, peak)


def decode_rows(
    subject: Subject,
    all_ways: Sequence[Way],
    batch: int,
    rounds: int,
    peak: tuple[float, float],
    not_run: Mapping[str, str],
) -> list[Row]:
    """All ways of generating at one batch size, by the seconds of a decoded step, and what bounds one.

    Args:
        subject: The model.
        all_ways: Stock first.
        batch: Prompts.
        rounds: How often.
        peak: Operations and bytes a second of the device.
        not_run: Ways that could not be checked, with the reason.
    """
    n_pos, n_new = DECODING[subject.shape]
    tokens = subject.tokens(batch, n_pos)
    works = {
        way.peer: (
            partial(way.run, tokens, n_new),
            partial(step_seconds, way, tokens, n_new, subject.device),
        )
        for way in all_ways
    }
    found = measure(works, rounds, subject.device, not_run)
    edits = {way.peer: way.edit for way in all_ways}
    return decoding_rows(subject, edits, batch, found, peak)


def step_seconds(way: Way, tokens: torch.Tensor, n_new: int, device: str) -> float:
    """Seconds of one decoded step: from the prompt's logits to the last token's."""
    stamps: list[float] = []
    n_passes = 0

    def note(*_: Any) -> None:
        nonlocal n_passes
        n_passes += 1
        if n_passes in (1, n_new):  # to wait after every step would stop what runs ahead
            stamps.append(clock_of(device))

    handle = way.unembedding.register_forward_hook(note)
    try:
        way.run(tokens, n_new)
    finally:
        handle.remove()
    assert n_passes == n_new, (way.peer, n_passes)
    return (stamps[1] - stamps[0]) / (n_new - 1)


def check_room(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Leave, in one line, where there is no such device or the weights do not fit into it."""
    device = arguments.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        not_here(
            f"{device} must be a CUDA device; torch {torch.__version__} finds none here; run this on a machine "
            "with a GPU, or see whether it runs with --device cpu --shape tiny"
        )
    decoder = Decoder.llama(SHAPES[arguments.shape])
    # The unembedding has weights of its own, and the embedding as many.
    n_bytes = decoder.n_bytes(unembed=True, word=dtype.itemsize)
    n_bytes += decoder.d_model * decoder.d_vocab * dtype.itemsize
    free = free_memory_bytes(device)
    if n_bytes > free:
        not_here(
            f"the weights must fit into {device}; {arguments.shape} takes {n_bytes / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; take a larger one, or --shape tiny"
        )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Check, then measure; rows in the order of the page."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    check_room(arguments, dtype)
    peak = peak_flops(dtype=dtype, device=device), peak_bandwidth(device=device)
    longest = max([*arguments.lengths, sum(DECODING[arguments.shape]), N_POS])
    subject = Subject.build(arguments.shape, device, dtype, longest)
    check_sinks(subject)
    not_run = check_edits(subject)
    rows: list[Row] = []
    for n_pos in arguments.lengths:
        rows += _said(capture_rows(subject, n_pos, arguments.rounds, peak, TILES))
    all_ways = ways(subject)
    for batch in BATCHES:
        rows += _said(decode_rows(subject, all_ways, batch, arguments.rounds, peak, not_run))
    return rows


def _said(rows: list[Row]) -> list[Row]:
    for row in rows:
        ratio = "" if row.ratio is None else f" x{row.ratio:.3f}"
        median = "" if row.median is None else f" {row.median:.4g} {row.unit}"
        print(f"{row.name:32s} {row.peer:48s}{median}{ratio}  {row.note}", flush=True)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, default=OUT / "gpu.json")
    arguments = parser.parse_args(given)
    with torch.no_grad():
        rows = run(arguments)
    lengths = " ".join(map(str, arguments.lengths))
    write_record(
        "gpu",
        rows,
        command=f"python benchmarks/gpu.py --device {arguments.device} --shape {arguments.shape} "
        f"--lengths {lengths} --dtype {arguments.dtype}",
        ratio_means="wall time over that of the plain forward (reading) or of stock `generate` (a decoded step)",
        conditions=f"{arguments.rounds} rounds in turn in one process, random weights; memory is the peak of one "
        "run beyond the loaded model",
        packages=PACKAGES,
        device=name_of(arguments.device),
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
