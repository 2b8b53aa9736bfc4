"""Ablations of a Bigram-Backcopy model: parts taken away, and the circuit that three blocks need.

One part at a time: attention or MLP of a block skipped, a head zeroed, a head's attention moved to
<s>. Of the parts, one makes the residual peak: the one without which it falls most.

The minimal circuit of three blocks or more: attention of the blocks from 2 on is needed for nothing;
block 0 raises the residual norm of <s>, and block 1 makes it the sink. So attention of the blocks
from 2 on is taken away first, and then block 0 as well (its attention and its MLP).

Paper: Guo et al. 2024, arXiv:2410.13835 (the circuit: its notebooks).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from toy_tasks.bigram_measure import HeldOut, ask, observe, over_rest
from toy_tasks.model import WHOLE_PATTERN, Tap, ToyModel, leave, n_learned_keys
from workbench.models.base import Site

N_MINIMAL = 3
"""Blocks that a model must have for its minimal circuit to be measured."""


def ablations(model: ToyModel) -> Iterator[tuple[str, Tap]]:
    """Every ablation of the model, by the name that results give it."""
    for layer in range(model.config.n_layers):
        yield f"no_attention:L{layer}", _skip(Site("attn_out", layer))
    if model.config.d_mlp:
        for layer in range(model.config.n_layers):
            yield f"no_mlp:L{layer}", _skip(Site("mlp_out", layer))
    for kind, make in (("zero_head", _zero_head), ("head_to_bos", _head_to_bos)):
        for layer in range(model.config.n_layers):
            for head in range(model.config.n_heads):
                yield f"{kind}:L{layer}H{head}", make(model, layer, head)


def _skip(*skipped: Site) -> Tap:
    return lambda site, x: torch.zeros_like(x) if site in skipped else x


def _zero_head(model: ToyModel, layer: int, head: int) -> Tap:
    def change(x: Tensor) -> Tensor:
        kept = x.clone()
        kept[:, :, head] = 0.0
        return kept

    return _at(Site("z", layer), change)


def _head_to_bos(model: ToyModel, layer: int, head: int) -> Tap:
    """All attention of the head to <s>; a learned token before it keeps its own row."""
    column = n_learned_keys(model.config)
    first_row = int(model.config.bias == "sink-token")

    def change(x: Tensor) -> Tensor:
        moved = x.clone()
        moved[:, head, first_row:] = 0.0
        moved[:, head, first_row:, column] = 1.0
        return moved

    return _at(Site(WHOLE_PATTERN, layer), change)


def _at(changed: Site, change: Callable[[Tensor], Tensor]) -> Tap:
    return lambda site, x: change(x) if site == changed else x


def ask_ablated(
    model: ToyModel, held_out: HeldOut, tap: Tap, depth: int
) -> tuple[float, float, float]:
    """Backcopy risk, bigram risk and residual peak (|h| of <s> over the rest) after a block.

    Args:
        model: Which is ablated.
        held_out: On which it is measured.
        tap: Does the ablation.
        depth: How many blocks the residual stream has passed; at least 1.
    """
    watched = Site("resid_post", depth - 1)
    peak = torch.nan

    def both(site: Site, x: Tensor) -> Tensor:
        nonlocal peak
        changed = tap(site, x)
        if site == watched:
            bos, rest = over_rest(changed.norm(dim=-1).mean(dim=0))
            peak = (bos / rest).item()
        return changed

    return (*ask(model, held_out, both), peak)


# The minimal circuit


class CircuitNumbers(NamedTuple):
    """What is left of a model under the ablations of its minimal circuit."""

    backcopy_risk: float
    bigram_risk: float
    sink_logit_gap: float
    """Of block 1."""
    value_norm_bos: float
    """Of block 1."""
    resid_norm_excess: float
    """After block 0: |h| of <s> minus that of the rest."""


def circuits(n_layers: int) -> dict[str, Tap]:
    """The model whole, its minimal circuit, and that without block 0; {} under three blocks."""
    if n_layers < N_MINIMAL:
        return {}
    late = {Site("attn_out", layer) for layer in range(N_MINIMAL - 1, n_layers)}
    first = {Site("attn_out", 0), Site("mlp_out", 0)}
    return {"whole": leave, "minimal": _skip(*late), "no_block:L0": _skip(*late, *first)}


def ask_circuit(model: ToyModel, held_out: HeldOut, tap: Tap) -> CircuitNumbers:
    """Measure a model of three blocks or more under one of ``circuits``."""
    found = observe(model, held_out, tap)
    bos, rest = over_rest(found.resid_norm)[:, 1].tolist()
    return CircuitNumbers(
        found.backcopy_risk,
        found.bigram_risk,
        found.sink_logit_gap[1].mean().item(),
        found.ov_norm_by_layer[1, 0].item(),
        bos - rest,
    )
