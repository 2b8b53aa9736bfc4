"""The Triton program behind ``column_kernel``: a module of its own, since triton is no dependency.

Import it where the kernel runs, and only there. ``TRITON_INTERPRET=1``, set before anything imports triton,
runs it on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

QUERIES = 64
"""Rows of the pattern that a program looks at together."""
LOG2_E = 1.4426950408889634


@triton.jit
@no_type_check  # triton compiles the text of the function, which a checked one would hide
def _program(
    query,
    key,
    log_sum,
    total,
    n_heads,
    n_groups,
    n_q,
    n_k,
    scale,
    query_batch,
    query_head,
    query_pos,
    query_dim,
    key_batch,
    key_head,
    key_pos,
    key_dim,
    D_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of one block of columns, for one prompt and head; ``scale`` and ``log_sum`` are to base 2."""
    which = tl.program_id(1).to(tl.int64)
    batch, head = which // n_heads, which % n_heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // n_groups) * key_head
    columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, WIDTH)
    inside = dims < D_HEAD
    keys = tl.load(
        key + columns[:, None] * key_pos + dims[None, :] * key_dim,
        mask=(columns < n_k)[:, None] & inside[None, :],
        other=0.0,
    )
    offset = n_k - n_q
    # The first query that sees the block's first key; what is before it sees none of them.
    first = tl.maximum(tl.program_id(0) * KEYS - offset, 0) // ROWS * ROWS
    received = tl.zeros([KEYS], dtype=tl.float32)
    for start in range(first, n_q, ROWS):
        rows = start + tl.arange(0, ROWS)
        queries = tl.load(
            query + rows[None, :] * query_pos + dims[:, None] * query_dim,
            mask=(rows < n_q)[None, :] & inside[:, None],
            other=0.0,
        )
        # Rows behind the last one have an infinite normaliser: they give nothing.
        norm = tl.load(log_sum + which * n_q + rows, mask=rows < n_q, other=float("inf"))
        scores = tl.dot(keys, queries, input_precision="ieee") * scale
        seen = columns[:, None] <= rows[None, :] + offset
        # Hidden before the exponential: what a row does not see may lie far above its normaliser.
        weight = tl.exp2(tl.where(seen, scores - norm[None, :], float("-inf")))
        received += tl.sum(weight, axis=1)
    tl.store(total + which * n_k + columns, received, mask=columns < n_k)


def launch(
    query: Float[Tensor, "batch head q_pos d_head"],
    key: Float[Tensor, "batch kv_head k_pos d_head"],
    log_sum: Float[Tensor, "batch head q_pos"],
    scaling: float,
) -> Float[Tensor, "batch head k_pos"]:
    """Run the program over all blocks of keys; ``log_sum`` is natural, infinite for rows that do not count."""
    batch, n_heads, n_q, d_head = query.shape
    n_k = key.shape[2]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # Triton's interpreter (3.9) would multiply the bits of bfloat16 as whole numbers.
        query, key = query.float(), key.float()
    total = torch.empty(batch, n_heads, n_k, dtype=torch.float32, device=query.device)
    width = max(16, triton.next_power_of_2(d_head))
    # A block of keys stays in fast memory while the queries pass by: wide heads leave room for fewer.
    keys = 128 if width <= 128 else 64
    # Triton launches on the current device, which need not be the layer's.
    with torch.cuda.device_of(query):
        _program[(triton.cdiv(n_k, keys), batch * n_heads)](
            query,
            key,
            (log_sum.float() * LOG2_E).contiguous(),
            total,
            n_heads,
            n_heads // key.shape[1],
            n_q,
            n_k,
            scaling * LOG2_E,
            *query.stride(),
            *key.stride(),
            D_HEAD=d_head,
            WIDTH=width,
            KEYS=keys,
            ROWS=QUERIES,
        )
    return total
