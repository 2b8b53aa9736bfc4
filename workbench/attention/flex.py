"""ZeroTuning inside the kernel: FlexAttention with a score_mod, for CUDA, when it is asked for.

    score'[q, k] = score[q, k] + log gamma[head] where k is the prompt's first key

The same map as the output form (card zerotuning section 2, D). It needs no second look at the first key,
but a kernel that is compiled for it: nothing chooses it by itself, because no GPU was at hand to measure
where it is faster.

    with flex_on_cuda(), model.edit(wb.ZeroTuning(2.0)):
        ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.errors import CapabilityError

_asked: ContextVar[bool] = ContextVar("flex_asked", default=False)


@contextmanager
def flex_on_cuda() -> Iterator[None]:
    """Within the context, biases of the first key's score run in FlexAttention.

    Raises:
        CapabilityError: When such an edit comes to a device that is not CUDA.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def refuse_if_asked(inputs: AttentionInputs) -> None:
    """Refuse to run an edit in another kernel than the one that was asked for.

    Raises:
        CapabilityError: FlexAttention was asked for, and this edit must run in tiles.
    """
    if is_asked(inputs):
        raise CapabilityError(
            "FlexAttention must have one edit to itself, no statistics of the pattern, and a gamma that is "
            "not small; this edit runs in tiles; leave flex_on_cuda() out"
        )


def is_asked(inputs: AttentionInputs) -> bool:
    """Whether FlexAttention must serve this call.

    Raises:
        CapabilityError: It was asked for, and cannot.
    """
    if not _asked.get():
        return False
    if inputs.query.device.type != "cuda":
        raise CapabilityError(
            f"FlexAttention must run on CUDA, where it is compiled; the model is on "
            f"{inputs.query.device.type}; leave flex_on_cuda() out"
        )
    if inputs.softcap is not None or inputs.sinks is not None:
        raise CapabilityError(
            "FlexAttention here must have plain scores; this layer caps them or has learned sinks; leave "
            "flex_on_cuda() out"
        )
    return True


def flex_first_key(
    inputs: AttentionInputs,
    log_gamma: Float[Tensor, " head"],
    first_key: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch q_pos head d_value"]:
    """Attention with a bias on the score of each prompt's first key.

    Args:
        inputs: Of one layer, without softcap and learned sinks.
        log_gamma: The bias of each head.
        first_key: Where each prompt begins; None: 0 for all.
    """
    device, batch = inputs.query.device, inputs.query.shape[0]
    first = torch.zeros(batch, dtype=torch.long) if first_key is None else first_key
    first, bias = first.to(device), log_gamma.to(device)

    output: Tensor = _kernel(device.type)(
        inputs.query,
        inputs.key,
        inputs.value,
        # Not a function with annotations: torch counts arguments, and a checked function hides them.
        score_mod=lambda score, b, h, _q, k: score + torch.where(k == first[b], bias[h], 0.0),
        block_mask=_block_mask(inputs),
        scale=inputs.scaling,
        enable_gqa=inputs.n_groups > 1,
    )
    return output.transpose(1, 2)


@cache
def _kernel(device: str) -> Any:
    """The fused kernel where there is one; on a CPU the operator's own plain definition, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _block_mask(inputs: AttentionInputs) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if inputs.mask is None and (not inputs.causal or inputs.query.shape[2] == 1):
        return None
    visible = inputs.visible()
    n_prompts, n_heads, n_q, n_k = visible.shape

    batch = inputs.query.shape[0] if n_prompts > 1 else None
    heads = inputs.query.shape[1] if n_heads > 1 else None
    return create_block_mask(
        lambda b, h, q, k: visible[b % n_prompts, h % n_heads, q, k],
        batch,
        heads,
        n_q,
        n_k,
        device=inputs.query.device.type,
    )
