"""What ``gpu.py`` measures: a Llama of random weights, ways of reading it and of editing what it generates.

All ways share one model's weights: a second copy of seven billion would not fit.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from generate_methods import GAMMA, twin
from reference import eager_zerotuning
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench as wb
from workbench.attention import statistics, streaming
from workbench.attention.column_kernel import SETTING
from workbench.attention.flex import flex_on_cuda
from workbench.memory import free_memory_bytes
from workbench.models.base import Site

SHAPES: dict[str, dict[str, float]] = {
    "llama-7b": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "initializer_range": 0.02,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 176,
        "vocab_size": 320,
        # So that patterns are as uneven as those of the width above: its weights give scores of 1.6.
        "initializer_range": 0.16,
    },
}
"""Of a LlamaConfig; every query head has keys of its own."""
DECODING = {"llama-7b": (1024, 64), "tiny": (16, 4)}
"""By shape: tokens of a prompt, and new ones."""
KEY_GAMMA = 1.2
"""Of ``mode=key``, whose gammas mean something else."""
PLAIN = "plain forward, flash attention"
KERNEL = "workbench, sinks, column kernel"
EAGER = "eager, output_attentions"
STOCK = "stock generate"


@dataclass(frozen=True)
class Subject:
    """A model of random weights, made where it runs."""

    shape: str
    device: str
    dtype: torch.dtype
    model: Any
    wrapped: Any

    @staticmethod
    def build(shape: str, device: str, dtype: torch.dtype, n_ctx: int) -> "Subject":
        """Make the weights on the device, in their precision: as float32 on the way they would take 28 GB.

        Args:
            shape: One of ``SHAPES``.
            device: Where it runs.
            dtype: Of weights and activations.
            n_ctx: Positions that prompts and new tokens need at most.
        """
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=n_ctx, use_cache=True)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        return Subject(shape, device, dtype, model.eval(), wb.wrap(model))

    def tokens(self, batch: int, n_pos: int) -> Tensor:
        """Random prompts, on the CPU."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.model.config.vocab_size, (batch, n_pos), generator=generator)

    def flash(self) -> AbstractContextManager[Any]:
        """Within the context SDPA is flash attention, or an error; on a CPU it is what it always is."""
        if torch.device(self.device).type == "cuda":
            return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        return nullcontext()


# Reading


def plain(subject: Subject) -> Callable[[Tensor], Any]:
    """The blocks and the final norm, without the unembedding: all that reading needs."""

    def run(tokens: Tensor) -> Any:
        with subject.flash():
            return subject.model.model(tokens.to(subject.device), use_cache=False)

    return run


def reading(
    subject: Subject, *, norms: bool = False, tile: int | None = None, kernel: bool = False
) -> Callable[[Tensor], Any]:
    """Mean attention every key receives in all layers and heads.

    Args:
        subject: The model.
        norms: Norms of values and of the residual stream as well.
        tile: Numbers in one tile of the pattern, in place of what the workbench takes.
        kernel: Sums of columns from the kernel that the setting asks for, in place of tiles.
    """

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)

    names = ("pattern", "v", "resid_post") if norms else ("pattern",)
    layers = range(subject.wrapped.spec.n_layers)
    sites = [Site(name, layer) for layer in layers for name in names]
    reduce: dict[str, Any] = {"pattern": statistics.ColumnMean()}
    if norms:
        sites.append(Site("resid_pre", 0))
        reduce |= dict.fromkeys(("v", "resid_pre", "resid_post"), norm)

    def run(tokens: Tensor) -> Any:
        tiles = streaming.tile_budget(tile, streaming.CUDA_TILE[1]) if tile else nullcontext()
        asked = patch.dict(os.environ, {SETTING: "triton"} if kernel else {})
        # The kernel's output is flash attention's own operator, which a choice of SDPA's leaves alone.
        with tiles, asked, subject.flash():
            return subject.wrapped.capture(tokens, sites, reduce)

    return run


def eager(subject: Subject) -> Callable[[Tensor], Any]:
    """Every layer's map, kept whole."""
    model = twin(subject.model, "eager")
    return lambda tokens: model.model(
        tokens.to(subject.device), use_cache=False, output_attentions=True
    )


def too_large(subject: Subject, n_pos: int) -> str:
    """Why eager's maps do not fit into what is free at this length; empty where they do."""
    spec, word = subject.wrapped.spec, subject.dtype.itemsize
    # All maps stay; a layer at work has its scores as well, and its softmax in float32.
    each = spec.n_heads * n_pos * n_pos
    needed = each * (spec.n_layers * word + word + 4)
    free = free_memory_bytes(subject.device)
    if needed < free:
        return ""
    return f"its maps take {needed / 1e9:,.3g} GB and {free / 1e9:,.3g} GB are free"


def readers(subject: Subject, tiles: list[int]) -> dict[str, Callable[[Tensor], Any]]:
    """All ways of reading, the plain forward first."""
    return {
        PLAIN: plain(subject),
        "workbench, sinks": reading(subject),
        "workbench, sinks + value norms + residual norms": reading(subject, norms=True),
        **{
            f"workbench, sinks, tiles of {tile:,} numbers": reading(subject, tile=tile)
            for tile in tiles
        },
        KERNEL: reading(subject, kernel=True),
        EAGER: eager(subject),
    }


# Generating

Run = Callable[..., Tensor]
"""(tokens [batch pos], how many new ones, options of ``generate``) -> tokens with the new ones."""


@dataclass(frozen=True)
class Way:
    """One way of generating."""

    peer: str
    edit: str
    """What it changes: ways of one edit must agree."""
    unembedding: Any
    run: Run


def workbench(subject: Subject, *edits: Any, flex: bool = False) -> Run:
    """Stock ``generate``, or the workbench's edits on all heads."""

    def run(tokens: Tensor, n_new: int, **options: Any) -> Tensor:
        given = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        with flex_on_cuda() if flex else nullcontext(), subject.wrapped.edit(*edits):
            return subject.wrapped.generate(tokens, **given, **options)

    return run


def eager_edit(subject: Subject, gamma: float, mode: str) -> tuple[Any, Run]:
    """Eager attention whose pattern or first key is changed, as research code has it."""
    model = twin(subject.model, "eager")
    model.set_attn_implementation(eager_zerotuning.register(gamma, mode))

    def run(tokens: Tensor, n_new: int, **options: Any) -> Tensor:
        tokens = tokens.to(subject.device)
        given = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
        given |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
        return model.generate(tokens, **given, **options).cpu()

    return model.lm_head, run


def ways(subject: Subject, gamma: float = GAMMA, key_gamma: float = KEY_GAMMA) -> list[Way]:
    """All ways of generating, stock first."""
    head = subject.model.lm_head
    found = [Way(STOCK, "no edit", head, workbench(subject))]
    for mode, factor in (("score", gamma), ("key", key_gamma)):
        name, edit = f"zerotuning {mode}", wb.ZeroTuning(factor, mode=mode)
        found.append(Way(f"workbench, {name}", name, head, workbench(subject, edit)))
        if mode == "score" and torch.device(subject.device).type == "cuda":
            run = workbench(subject, edit, flex=True)
            found.append(Way(f"workbench, {name}, flex_on_cuda", name, head, run))
        found.append(Way(f"eager, edited {mode}", name, *eager_edit(subject, factor, mode)))
    return found
