"""What a cell will take: memory from sizes, time from earlier runs or a short calibration.

Memory is that of the weights, of one batch's activations and logits, and of the libraries; patterns
are streamed. Time is that of earlier results of the same probe and model where the store has some,
else that of a single pass over the prompts, which is a lower bound for probes that make many.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError, WorkbenchError
from workbench.execute.cell import Cell
from workbench.models.names import resolve_model
from workbench.revisions import weight_files

if TYPE_CHECKING:
    from workbench.store.results import Store

LIBRARY_BYTES = 500 << 20
"""Of a process with torch and transformers; 400 to 460 MB were measured with the demo model."""
BATCH_BYTES = 256 << 20
"""What an automatic batch size aims at; see ``workbench.run``."""
CHARACTERS_A_TOKEN = 4
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_DEFAULT_TOKENS = 128 * 64


@dataclass(frozen=True)
class Sizes:
    """Of a model, from its folder alone."""

    weight_bytes: int
    n_parameters: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True)
class Estimate:
    """What one cell will take; None: not known before the model is there."""

    memory_bytes: int | None
    seconds: float | None
    is_lower_bound: bool = False
    """Whether ``seconds`` is one pass over the prompts only."""


def model_sizes(cell: Cell) -> Sizes | None:
    """Sizes of a cell's model; None for one that is not on this machine."""
    folder = Path(resolve_model(cell.model))
    if not (folder / "config.json").is_file():
        return None
    try:
        stored = sum(path.stat().st_size for path in weight_files(folder))
    except (WorkbenchError, OSError):
        return None
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}

    def number(*names: str, default: int) -> int:
        found = (config[name] for name in names if isinstance(config.get(name), int))
        return next(found, default)

    kept = _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
    wanted = _DTYPE_BYTES.get(str(cell.options.get("dtype")), kept)
    d_model = number("hidden_size", "n_embd", "d_model", default=256)
    return Sizes(
        weight_bytes=stored * wanted // kept,
        n_parameters=stored // kept,
        d_model=d_model,
        d_mlp=number("intermediate_size", "n_inner", "d_mlp", "ffn_dim", default=4 * d_model),
        d_vocab=number("vocab_size", "d_vocab", default=50_000),
        n_ctx=number("max_position_embeddings", "n_positions", "n_ctx", default=1024),
    )


def memory_bytes(cell: Cell, sizes: Sizes) -> int:
    """What a process needs at most while it runs a cell."""
    n_pos = min(int(cell.options.get("n_pos") or sizes.n_ctx), sizes.n_ctx)
    per_prompt = 4 * n_pos * (16 * sizes.d_model + 4 * sizes.d_mlp)
    batch = cell.options.get("batch_size") or max(1, BATCH_BYTES // per_prompt)
    batch = min(batch, _n_prompts(cell) or batch)
    logits = 4 * n_pos * sizes.d_vocab
    return LIBRARY_BYTES + sizes.weight_bytes + batch * (per_prompt + logits)


def _n_prompts(cell: Cell) -> int:
    """Prompts of a cell; 0 where they are still to be drawn, or none are needed."""
    from workbench.sources import read_source

    limit = cell.options.get("limit")
    if cell.data is None:
        return limit or 0
    return len(read_source(cell.data, limit))


def flops_a_second(seconds: float = 0.2) -> float:
    """What this machine multiplies, by a short calibration."""
    import torch

    n = 384
    left, right = torch.ones(n, n), torch.ones(n, n)
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        left @ right
        count += 1
    return count * 2 * n**3 / taken


def n_tokens(cell: Cell) -> int:
    """Tokens of a cell's prompts, about; every prompt counts at full length."""
    from workbench.sources import read_source

    if cell.data is None:
        return 0
    raw = read_source(cell.data, cell.options.get("limit"))
    n_pos = cell.options.get("n_pos")
    parts = list(raw.domains.values()) or [raw]
    total = 0
    for part in parts:
        lengths = [len(text) // CHARACTERS_A_TOKEN + 1 for text in part.texts]
        lengths += [len(ids) for ids in part.ids]
        total += sum(min(length, n_pos or length) for length in lengths) or _DEFAULT_TOKENS
    return total


class Estimator:
    """Estimates cells of one plan; each model is looked at once."""

    def __init__(self, store: "Store") -> None:
        self._past: dict[tuple[str, str], list[float]] = {}
        for entry in store.list():
            record = store.shelf.read(entry.key, deep=False)
            seconds = record.document["provenance"].get("seconds") if record else None
            if isinstance(seconds, int | float):
                self._past.setdefault((entry.probe, entry.model), []).append(float(seconds))
        self._sizes: dict[str, Sizes | None] = {}
        self._rate: float | None = None

    def estimate(self, cell: Cell) -> Estimate:
        """Memory and time of one cell."""
        if cell.load_key not in self._sizes:
            self._sizes[cell.load_key] = model_sizes(cell)
        sizes = self._sizes[cell.load_key]
        memory = None if sizes is None else memory_bytes(cell, sizes)
        past = self._past.get((cell.probe, _shown_name(cell)))
        if past:
            return Estimate(memory, statistics.median(past))
        if sizes is None:
            return Estimate(memory, None)
        if self._rate is None:
            self._rate = flops_a_second()
        return Estimate(memory, 2 * sizes.n_parameters * n_tokens(cell) / self._rate, True)


def _shown_name(cell: Cell) -> str:
    """The model's name as results have it: a folder's own name."""
    folder = Path(resolve_model(cell.model))
    return folder.resolve().name if cell.model != "demo" and folder.is_dir() else cell.model


def refuse_what_cannot_fit(
    cells: Sequence[Cell], estimates: Sequence[Estimate], n_workers: int, free_bytes: int
) -> None:
    """Refuse a sweep before it starts when a cell, or as many as run at once, cannot fit.

    Args:
        cells: What is to be computed.
        estimates: Of each.
        n_workers: How many run at once on one machine.
        free_bytes: Memory that can be had there.

    Raises:
        ConfigError: Says which cell and by how much.
    """
    needs = [(found.memory_bytes or 0, cell) for found, cell in zip(estimates, cells, strict=True)]
    if not needs:
        return
    most, cell = max(needs, key=lambda pair: pair[0])
    if most > free_bytes:
        too_large = sum(need > free_bytes for need, _ in needs)
        raise ConfigError(
            f"every cell must fit in memory; {too_large} of {len(cells)} do not: {cell.describe()} "
            f"needs about {_giga(most)} and {_giga(free_bytes)} are free; lower n_pos or batch_size, "
            "use a smaller dtype, or spread the model over devices with device_map"
        )
    at_once = min(n_workers, len(cells))
    if at_once * most > free_bytes:
        raise ConfigError(
            f"{at_once} workers must fit in memory at once; each may need {_giga(most)} and "
            f"{_giga(free_bytes)} are free; give --workers {max(1, free_bytes // most)}"
        )


def _giga(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def free_bytes(cells: Sequence[Cell]) -> int:
    """Memory a worker can have: the smallest GPU's where cells run on GPUs, else the machine's."""
    from workbench.models.memory import free_memory_bytes

    devices = {str(cell.options.get("device", "auto")) for cell in cells}
    spread = any(cell.device_map is not None for cell in cells)
    if devices == {"cpu"}:
        return free_memory_bytes()
    import torch

    gpus: list[Any] = [
        torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())
    ]
    if not gpus:
        return free_memory_bytes()
    return sum(gpus) if spread else min(gpus)
