"""Column sums of the pattern in one fused kernel, when ``WORKBENCH_COLUMN_KERNEL=triton`` asks for it.

    sum over q of P[q, k] = sum over q >= k of exp(scaling * q . k - log_sum[q])

Flash attention returns every row's log-sum-exp with its output; with it one more product of queries and keys
gives the sums, and no tile of the pattern is ever in memory. Nothing chooses the kernel by itself: it was tested
in Triton's interpreter only, because no GPU was at hand. Column means that a capture asks for then come from it or
are refused; other statistics, and what edits look up for themselves, go through the tiles as ever.
"""

import importlib.util
import os
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.fused import flash_on_cuda, fused_attention
from workbench.attention.inputs import AttentionInputs
from workbench.attention.statistics import ColumnMean, mean_of_columns
from workbench.attention.streaming import Attended, PatternShape, PatternStatistic
from workbench.errors import CapabilityError, ConfigError

SETTING = "WORKBENCH_COLUMN_KERNEL"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256


def is_asked(statistics: Mapping[str, PatternStatistic]) -> bool:
    """Whether the setting is on and a column mean is among the statistics.

    Raises:
        ConfigError: The setting has another value than "triton".
    """
    said = os.environ.get(SETTING, "")
    if said not in ("", "triton"):
        raise ConfigError(f"{SETTING} must be triton, or not set; it is {said!r}")
    return bool(said) and any(isinstance(each, ColumnMean) for each in statistics.values())


def column_means(
    inputs: AttentionInputs,
    statistics: Mapping[str, PatternStatistic],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
) -> Attended:
    """Output from the fused kernel of attention, column means from the kernel of column sums.

    Raises:
        CapabilityError: The kernels do not serve this call; says why.
    """
    if not all(isinstance(each, ColumnMean) for each in statistics.values()):
        raise refusal("column means and no other statistic of the pattern beside them")
    _check(inputs)
    on_cuda = inputs.query.device.type == "cuda"
    found = flash_on_cuda(inputs) if on_cuda else fused_attention(inputs)
    if found is None:
        raise refusal(
            "a layer that flash attention serves: values as wide as keys, as many queries as keys or one, on CUDA "
            "half precision, heads of a multiple of 8 and compute capability 8"
        )
    output, log_sum = found
    batch, n_heads, n_q, _ = inputs.query.shape
    n_k, device = inputs.key.shape[2], inputs.query.device
    total = column_sums(inputs, log_sum, row_valid)
    mean = mean_of_columns(total, PatternShape(batch, n_heads, n_q, n_k, device, row_valid))
    return Attended(output, log_sum, dict.fromkeys(statistics, mean))


def column_sums(
    inputs: AttentionInputs,
    log_sum: Float[Tensor, "batch head q_pos"],
    row_valid: Float[Tensor, "batch q_pos"] | None = None,
) -> Float[Tensor, "batch head k_pos"]:
    """Sum each column of the pattern over the rows that count, in float32.

    Args:
        inputs: Of one layer; with a cache the queries are the last ones.
        log_sum: Log of every row's softmax normaliser, infinite for a row that sees nothing.
        row_valid: 1 for queries that are real tokens, 0 for padding; None: all real.

    Raises:
        CapabilityError: The kernel does not serve these inputs, or does not run here.
    """
    _check(inputs)
    from workbench.attention.column_kernel_triton import launch

    if row_valid is not None:
        # A row's weight is part of its normaliser: that of padding becomes infinite.
        log_sum = log_sum - row_valid.to(log_sum).log()[:, None]
    return launch(inputs.query, inputs.key, log_sum, inputs.scaling)


def why_not_served(inputs: AttentionInputs) -> str:
    """What the kernel would need of a layer's inputs and does not find; empty where it serves."""
    query, key = inputs.query, inputs.key
    if inputs.softcap is not None or inputs.sinks is not None:
        return "plain scores; this layer caps them or has learned sinks"
    if inputs.mask is not None:
        return "no mask; this call has one, for padding, a window or eager attention"
    if not inputs.causal:
        return "causal attention; this layer is bidirectional"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, inputs.value)):
        return "no gradients; queries, keys or values require them"
    if query.dtype not in _DTYPES:
        return f"float32, bfloat16 or float16; the model is in {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > _WIDEST:
        return f"heads of at most {_WIDEST}; this layer's are {query.shape[-1]} wide"
    return ""


def why_not_here(device: torch.device | str) -> str:
    """What the kernel would need of the machine and does not find; empty where it runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which comes with torch's builds for CUDA; it is not installed"
    import triton

    kind = torch.device(device).type
    if kind == "cuda" and not triton.knobs.runtime.interpret:
        return ""
    if kind == "cpu" and triton.knobs.runtime.interpret:
        return ""
    return f"CUDA, or a CPU and TRITON_INTERPRET=1 for tests; the model is on {kind}"


def refusal(needed: str) -> CapabilityError:
    """The error of a call that must not run in another kernel than the one that was asked for."""
    return CapabilityError(f"the column kernel must have {needed}; leave {SETTING} out")


def _check(inputs: AttentionInputs) -> None:
    needed = why_not_served(inputs) or why_not_here(inputs.query.device)
    if needed:
        raise refusal(needed)
