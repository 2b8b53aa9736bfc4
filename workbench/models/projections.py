"""The projections of attention, head by head, out of the modules that hold them.

Each reader takes one block and gives W_Q, W_K and W_V in TransformerLens' layout.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from workbench.models.base import ModelSpec

QKV = tuple[
    Float[Tensor, "head d_model d_head"],
    Float[Tensor, "kv d_model d_head"],
    Float[Tensor, "kv d_model d_head"],
]


def linear_qkv(block: nn.Module, spec: ModelSpec) -> QKV:
    """From three linear layers, as in Llama, OPT and CLIP."""
    attn: Any = block.self_attn
    return (
        _heads_out(attn.q_proj.weight.T, spec.n_heads),
        _heads_out(attn.k_proj.weight.T, spec.n_kv_heads),
        _heads_out(attn.v_proj.weight.T, spec.n_kv_heads),
    )


def _fused_qkv(weight: Float[Tensor, "d_model out"], spec: ModelSpec) -> QKV:
    """q, k and v side by side."""
    sizes = [heads * spec.d_head for heads in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)]
    q, k, v = weight.split(sizes, dim=-1)
    return (
        _heads_out(q, spec.n_heads),
        _heads_out(k, spec.n_kv_heads),
        _heads_out(v, spec.n_kv_heads),
    )


def gpt2_qkv(block: nn.Module, spec: ModelSpec) -> QKV:
    """From GPT-2's one Conv1D: q, k and v side by side."""
    attn: Any = block.attn
    return _fused_qkv(attn.c_attn.weight, spec)  # Conv1D keeps [in out]


def phi3_qkv(block: nn.Module, spec: ModelSpec) -> QKV:
    """From Phi-3's one linear layer: q, k and v side by side."""
    attn: Any = block.self_attn
    return _fused_qkv(attn.qkv_proj.weight.T, spec)


def neox_qkv(block: nn.Module, spec: ModelSpec) -> QKV:
    """From GPT-NeoX's one linear layer."""
    attn: Any = block.attention
    # q, k and v of one head stand together: [d_model, head * 3 * d_head].
    weight = _heads_out(attn.query_key_value.weight.T, spec.n_heads)
    q, k, v = weight.chunk(3, dim=-1)
    return q, k, v


def t5_qkv(block: nn.Module, spec: ModelSpec) -> QKV:
    """From the three linear layers inside T5's first sublayer."""
    attn: Any = block.get_submodule("layer.0.SelfAttention")
    q, k, v = (_heads_out(part.weight.T, spec.n_heads) for part in (attn.q, attn.k, attn.v))
    return q, k, v


def _heads_out(
    weight: Float[Tensor, "d_model out"], n_heads: int
) -> Float[Tensor, "head d_model d_head"]:
    return weight.unflatten(-1, (n_heads, -1)).transpose(0, 1)


def w_o_heads(module: nn.Module, n_heads: int) -> Float[Tensor, "head d_head d_model"]:
    """The output projection by head, from a Linear or GPT-2's Conv1D."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows = weight if type(module).__name__ == "Conv1D" else weight.T
    return rows.unflatten(0, (n_heads, -1))
