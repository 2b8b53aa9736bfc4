"""Where heads look in a list of successive items: the effective OV circuit leaves attention out.

A head that maps " Monday" to " Tuesday" is of use only if it attends to " Monday". So every head is
shown lists of three successive items, each followed by a comma where the tokenizer has one, and its
attention from the last token, which must name the next item, to the last item is read.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230, whose score ignores attention.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.successor_heads_tokens import TokenSets, single_token
from workbench.context import Context
from workbench.models.base import ModelAdapter, Site

N_ITEMS = 3
MAX_LISTS = 32
"""Of one series, spread over it."""
BATCH = 64


def list_prompts(tokenizer: Any, sets: TokenSets) -> tuple[Int[Tensor, "prompt pos"], int]:
    """Lists of successive items, behind BOS where the tokenizer puts one.

    Returns:
        The prompts, none if no series has three successive single tokens; and the position of the last
        item.
    """
    comma = single_token(tokenizer, ",")
    between = [] if comma is None else [comma]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = tokenizer("a")["input_ids"][:1]
    front = [bos] if bos is not None and start == [bos] else []
    prompts: list[list[int]] = []
    for task in sets.tasks:
        tokens = sets.fullest(task)
        after = dict(tokens.pairs().tolist())
        runs = [(a, after[a], after[after[a]]) for a in after if after[a] in after]
        step = -(-len(runs) // MAX_LISTS) or 1
        prompts += [
            front + [id_ for row in run for id_ in (tokens.ids[row], *between)]
            for run in runs[::step]
        ]
    last = len(front) + (N_ITEMS - 1) * (1 + len(between))
    return torch.tensor(prompts, dtype=torch.long).reshape(len(prompts), -1), last


def list_attention(
    model: ModelAdapter, sets: TokenSets, context: Context
) -> Float[Tensor, "layer head"] | None:
    """Mean attention from the end of a list to its last item, in [0, 1].

    Returns:
        None where the model shows no patterns or no list can be made.
    """
    prompts, item = list_prompts(model.tokenizer, sets)
    if "patterns" not in model.capabilities or not len(prompts):
        return None
    if prompts.shape[1] > model.spec.n_ctx:
        return None
    sites = [Site("pattern", layer) for layer in range(model.spec.n_layers)]

    def measure(start: int) -> dict[str, Tensor]:
        found = model.capture(
            prompts[start : start + size],
            sites,
            lambda pattern: pattern[:, :, -1, item].float().sum(dim=0).cpu(),
        )
        return {"sum": torch.stack([found[site] for site in sites])}

    size = context.batch_size or BATCH
    parts = [
        context.piece(f"lists-{start}", lambda s=start: measure(s))
        for start in range(0, len(prompts), size)
    ]
    return torch.stack([part["sum"] for part in parts]).sum(dim=0) / len(prompts)
