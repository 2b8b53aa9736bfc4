"""What a cell will take: memory from sizes, time from earlier runs or a short calibration.

Memory is that of the weights, of one batch's activations and logits, and of the libraries; patterns
are streamed. Time is that of earlier results of the same probe and model where the store has some,
else that of a single pass over the prompts, which is a lower bound for probes that make many.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import memory
from workbench.errors import ConfigError, WorkbenchError
from workbench.execute.cell import Cell
from workbench.execute.inputs import PlanInputs
from workbench.models.names import resolve_model
from workbench.revisions import hub_folder, weight_files

if TYPE_CHECKING:
    from workbench.store.results import Store

LIBRARY_BYTES = 500 << 20
"""Of a process with torch and transformers; 400 to 460 MB were measured with the demo model."""
PAST_RUNS = 5
"""So many of the newest results of a probe and a model tell how long the next one takes."""
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


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


@dataclass(frozen=True)
class Room:
    """What the workers of an executor have."""

    free_bytes: int
    """Of one place: a machine, or a GPU."""
    n_workers: int = 1
    """At once, over all places."""
    n_places: int = 1


def model_sizes(cell: Cell) -> Sizes | None:
    """Sizes of a cell's model; None for one that is not on this machine."""
    folder = Path(resolve_model(cell.model))
    if not folder.is_dir():
        folder = hub_folder(cell.model, cell.options.get("revision")) or folder
    if not (folder / "config.json").is_file():
        return None
    try:
        stored = sum(path.stat().st_size for path in weight_files(folder))
    except (WorkbenchError, OSError):
        return None
    config = json.loads((folder / "config.json").read_text("utf-8"))
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}

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


def memory_bytes(
    cell: Cell, sizes: Sizes, n_prompts: int = 0, longest: int = 0, free_bytes: int = 1 << 50
) -> int:
    """What a process needs at most while it runs a cell.

    Args:
        cell: What is to be run.
        sizes: Of its model.
        n_prompts: 0: however many there are.
        longest: Tokens of the longest prompt at most; 0: as many as the model takes.
        free_bytes: Memory by which an automatic batch size is chosen.
    """
    n_pos = min(int(cell.options.get("n_pos") or longest or sizes.n_ctx), sizes.n_ctx)
    per_prompt = 4 * n_pos * (16 * sizes.d_model + 4 * sizes.d_mlp)
    batch = cell.options.get("batch_size") or memory.automatic_batch_size(sizes, n_pos, free_bytes)
    batch = min(batch, n_prompts or batch)
    logits = 4 * n_pos * sizes.d_vocab
    return LIBRARY_BYTES + sizes.weight_bytes + batch * (per_prompt + logits)


def flops_a_second(device: str = "cpu", seconds: float = 0.2) -> float:
    """What a device multiplies, by a short calibration."""
    import torch

    n = 384 if device == "cpu" else 4096
    left, right = torch.ones(2, n, n, device=device)
    (left @ right).sum().item()  # a GPU's first product loads its library
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        (left @ right)[0, 0].item()  # waits for the result
        count += 1
    return count * 2 * n**3 / taken


class Estimator:
    """Estimates cells of one plan; each model and each text is looked at once."""

    def __init__(self, store: "Store", inputs: PlanInputs) -> None:
        """Note what the store has.

        Args:
            store: Its results tell how long their like took.
            inputs: The files that the plan rests on.
        """
        self._store, self._inputs = store, inputs
        self._entries: dict[tuple[str, str], list[str]] = {}
        for entry in store.list():
            newest = self._entries.setdefault((entry.probe, entry.model), [])
            if len(newest) < PAST_RUNS:
                newest.append(entry.key)
        self._past: dict[tuple[str, str], float | None] = {}
        self._sizes: dict[str, Sizes | None] = {}
        self._rates: dict[str, float | None] = {}
        self._free_bytes = memory.free_memory_bytes()

    def estimate(self, cell: Cell) -> Estimate:
        """Memory and time of one cell."""
        if cell.load_key not in self._sizes:
            self._sizes[cell.load_key] = model_sizes(cell)
        sizes = self._sizes[cell.load_key]
        prompts = self._inputs.prompts(cell.data, cell.options.get("limit"))
        n_prompts = len(prompts.lengths) if prompts else cell.options.get("limit") or 0
        # Lengths are guessed from characters: twice that is room enough.
        longest = 2 * max(prompts.lengths, default=0) if prompts else 0
        needed = None
        if sizes is not None:
            needed = memory_bytes(cell, sizes, n_prompts, longest, self._free_bytes)
        past = self._seconds_before(cell)
        if past is not None or sizes is None:
            return Estimate(needed, past)
        rate = self._rate(cell)
        if rate is None:
            return Estimate(needed, None)
        n_tokens = prompts.n_tokens(cell.options.get("n_pos")) if prompts else 0
        return Estimate(needed, 2 * sizes.n_parameters * n_tokens / rate, True)

    def _seconds_before(self, cell: Cell) -> float | None:
        """The median time of the newest results of the same probe and model."""
        name = self._inputs.model(cell.model, cell.options.get("revision")).name
        kind = (cell.probe, "demo" if cell.model == "demo" else name)
        if kind not in self._past:
            records = [self._store.look(key) for key in self._entries.get(kind, ())]
            times = [r.document["provenance"].get("seconds") for r in records if r is not None]
            known = [float(time) for time in times if isinstance(time, int | float)]
            self._past[kind] = statistics.median(known) if known else None
        return self._past[kind]

    def _rate(self, cell: Cell) -> float | None:
        """Of the cell's device; None for one that only other machines have."""
        from workbench.models.checkpoint import pick_device

        wanted = cell.options.get("device", "auto")
        if wanted not in self._rates:
            try:
                self._rates[wanted] = flops_a_second(pick_device(wanted))
            except ConfigError:
                self._rates[wanted] = None
        return self._rates[wanted]


def refuse_what_cannot_fit(
    cells: Sequence[Cell], estimates: Sequence[Estimate], room: Room
) -> None:
    """Refuse a sweep before it starts when a cell, or as many as run at once, cannot fit.

    Args:
        cells: What is to be computed.
        estimates: Of each.
        room: Where they run.

    Raises:
        ConfigError: Says which cell and by how much.
    """
    needs = [(found.memory_bytes or 0, cell) for found, cell in zip(estimates, cells, strict=True)]
    if not needs:
        return
    most, cell = max(needs, key=lambda pair: pair[0])
    free_bytes = room.free_bytes
    if most > free_bytes:
        too_large = sum(need > free_bytes for need, _ in needs)
        raise ConfigError(
            f"every cell must fit in memory; {too_large} of {len(cells)} do not: {cell.describe()} "
            f"needs about {_giga(most)} and {_giga(free_bytes)} are free; lower n_pos or batch_size, "
            "use a smaller dtype, or spread the model over devices with device_map"
        )
    n_workers = min(room.n_workers, len(cells))
    at_once = math.ceil(n_workers / room.n_places)
    if at_once * most > free_bytes:
        where = "" if room.n_places == 1 else f" of each of {room.n_places} GPUs"
        raise ConfigError(
            f"{at_once} workers must fit in memory at once; each may need {_giga(most)} and "
            f"{_giga(free_bytes)}{where} are free; give --workers "
            f"{free_bytes // most * room.n_places}"
        )


def _giga(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def room_here(cells: Sequence[Cell], n_workers: int) -> Room:
    """What this machine has for cells: its GPUs' memory where they run on GPUs, else its own.

    Raises:
        ConfigError: A cell's device is not here.
    """
    from workbench.models.checkpoint import pick_device

    for device in {cell.options.get("device", "auto") for cell in cells}:
        pick_device(device)
    spread = any(cell.device_map is not None for cell in cells)
    gpus: list[int] = []
    if {str(cell.options.get("device", "auto")) for cell in cells} != {"cpu"}:
        import torch

        gpus = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    if not gpus:
        return Room(memory.free_memory_bytes(), n_workers)
    return Room(sum(gpus), n_workers) if spread else Room(min(gpus), n_workers, len(gpus))
