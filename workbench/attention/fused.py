"""The fused kernel of stock SDPA, with what it usually throws away: every row's log-sum-exp.

``torch.nn.functional.scaled_dot_product_attention`` on a CPU runs this operator and drops its second
output. With it, an edit in output form needs no pass over the keys of its own: the weight of any key
is exp(score - log_sum). CUDA's flash attention has such a second output too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.attention.scores import shows

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fused_attention(
    inputs: AttentionInputs,
) -> tuple[Float[Tensor, "batch q_pos head d_value"], Float[Tensor, "batch head q_pos"]] | None:
    """Output and log-sum-exp from the fused kernel; None where it does not serve.

    It serves on a CPU, without gradients, scores as they are (no softcap, no learned sinks) and
    values as wide as keys. A row that sees nothing has log-sum-exp infinity, as in ``attend``.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    n_q, n_k = query.shape[2], key.shape[2]
    if query.device.type != "cpu" or query.dtype not in _FLOATS or key.shape[-1] != value.shape[-1]:
        return None
    if inputs.softcap is not None or inputs.sinks is not None:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    is_causal = inputs.mask is None and inputs.causal and n_q > 1
    if is_causal and n_q != n_k:
        # The kernel aligns the first query with the first key; ours stands behind a cache.
        return None
    mask = inputs.mask
    if mask is not None and mask.dtype != query.dtype:
        visible = shows(mask)
        mask = torch.zeros((), dtype=query.dtype).masked_fill(~visible, -torch.inf)
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=inputs.scaling
    )
    if mask is not None:
        log_sum = log_sum.masked_fill(~shows(mask).any(dim=-1), torch.inf)
    return output.transpose(1, 2), log_sum


def flash_on_cuda(
    inputs: AttentionInputs,
) -> tuple[Float[Tensor, "batch q_pos head d_value"], Float[Tensor, "batch head q_pos"]] | None:
    """Output and log-sum-exp from CUDA's flash attention; None where it does not serve.

    It serves half precision, heads of a multiple of 8, and causal rows without a mask. It was written
    from the operator's schema and has never run; nothing takes it but the column kernel, when asked for.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    n_q, n_k, d_head = query.shape[2], key.shape[2], query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16) or d_head % 8:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0) or d_head != value.shape[-1]:
        return None
    if inputs.mask is not None or n_q not in (1, n_k):
        return None
    # Returned besides: what its backward pass and a debugger would need.
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, inputs.causal and n_q > 1, False, scale=inputs.scaling
    )
    return output.transpose(1, 2), log_sum
