"""All numbers of all prompts, batch by batch; what is finished survives a killed run.

Paper: Guo et al. 2024, arXiv:2410.13835.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.active_dormant_ablation import ablate_all_heads, rows_at_once
from probes.active_dormant_activity import MIN_POS, measure_activity, measure_peaks
from workbench.attention.written import output_grams
from workbench.context import Context
from workbench.errors import DataError
from workbench.models.base import ModelAdapter


@dataclass(frozen=True, eq=False)
class PromptNumbers:
    """One number a prompt and head (or depth, or part)."""

    activity: dict[str, Float[Tensor, "prompt layer_or_depth *head"]]
    """As ``measure_activity`` names them."""
    loss: Float[Tensor, " prompt"]
    """With all heads in place, in nats per token."""
    change: Float[Tensor, "ablation prompt layer head"]
    """What zeroing, and moving to the first token, adds to it."""
    peaks: Float[Tensor, "prompt part layer"]
    """Largest residual norm at position 0 without each part."""


def check_lengths(tokens: Int[Tensor, "prompt pos"], context: Context) -> None:
    """Refuse prompts that are too short.

    Raises:
        DataError: Names the first one.
    """
    mask = context.attention_mask
    lengths = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(dim=1)
    if int(lengths.min()) < MIN_POS:
        row = int(lengths.argmin())
        raise DataError(
            f"prompts must have at least {MIN_POS} tokens, so that a query has another key to compare "
            f"the first one with; prompt {row} has {int(lengths[row])}; leave it out, or set n_pos"
        )


def measure_prompts(
    model: ModelAdapter,
    tokens: Int[Tensor, "prompt pos"],
    context: Context,
    n_rows: int | None = None,
) -> PromptNumbers:
    """Measure every prompt; progress is counted in batches and their layers.

    Args:
        model: The model.
        tokens: All prompts.
        context: Padding, batch size, progress, and where finished parts are kept.
        n_rows: Ablated prompts in one pass; None: by the size of the logits, the batch size at most.
    """
    n_batches = -(-len(tokens) // (context.batch_size or len(tokens)))
    steps = _Steps(context, n_batches * (model.spec.n_layers + 1))
    quiet = replace(context, progress=lambda done, total: None)
    gram = output_grams(model)
    parts = []
    for batch in quiet.batches(tokens):
        part = context.piece(
            f"activity-{batch.start}", lambda batch=batch: measure_activity(model, batch, gram)
        )
        parts.append(part)
        steps.done()
    activity = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = rows_at_once(model.spec, tokens.shape[1], n_rows, context.batch_size)
    loss, change = ablate_all_heads(model, tokens, quiet, rows, steps.done)
    peaks = context.piece("peaks", lambda: {"peaks": measure_peaks(model, tokens[:, 0])})["peaks"]
    return PromptNumbers(activity, loss, change, peaks)


class _Steps:
    """Counts what is done and reports it."""

    def __init__(self, context: Context, total: int) -> None:
        self.context, self.total, self.n = context, total, 0

    def done(self) -> None:
        self.n += 1
        self.context.progress(self.n, self.total)
