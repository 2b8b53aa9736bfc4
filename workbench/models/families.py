"""Where each architecture keeps its blocks, its residual stream and its attention weights.

Module paths are those of transformers. ``attn_out`` and ``mlp_out`` name the module whose output
is added to the residual stream (a norm, in families that normalise after the sublayer);
``mid`` the module whose input is the residual stream between attention and MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from workbench.errors import CapabilityError
from workbench.models.base import ModelSpec
from workbench.models.projections import QKV, gpt2_qkv, linear_qkv, neox_qkv, phi3_qkv, t5_qkv


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture; those of a block are relative to the block."""

    blocks: str
    ln_final: str
    attn: str | None
    attn_out: str | None
    mlp_out: str
    mid: str | None
    """None: no such place (parallel attention and MLP, or no attention)."""
    w_o: str | None
    read_qkv: Callable[[nn.Module, ModelSpec], QKV] | None
    positions: str = "rotary"
    position_table: str | None = None
    """Embedding module of learned positions."""
    position_offset: int = 0
    """Row of the table that holds position 0."""
    ln_mlp: str | None = None
    """The norm before the MLP."""
    mlp: str | None = None
    w_q: str | None = None
    """The projection that makes the queries and nothing else; None: one makes keys and values too."""


LLAMA = Family(
    blocks="model.layers",
    ln_final="model.norm",
    attn="self_attn",
    attn_out="self_attn",
    mlp_out="mlp",
    mid="post_attention_layernorm",
    w_o="self_attn.o_proj",
    read_qkv=linear_qkv,
    ln_mlp="post_attention_layernorm",
    mlp="mlp",
    w_q="self_attn.q_proj",
)
# OLMo 2 normalises what a sublayer adds, and nothing before it.
_OLMO2 = replace(
    LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mid="mlp",
    ln_mlp=None,
)
_GEMMA2 = replace(_OLMO2, mid="pre_feedforward_layernorm", ln_mlp="pre_feedforward_layernorm")

MAMBA = Family(
    blocks="backbone.layers",
    ln_final="backbone.norm_f",
    attn=None,
    attn_out=None,
    mlp_out="mixer",
    mid=None,
    w_o=None,
    read_qkv=None,
    positions="none",
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="transformer.h",
        ln_final="transformer.ln_f",
        attn="attn",
        attn_out="attn",
        mlp_out="mlp",
        mid="ln_2",
        w_o="attn.c_proj",
        read_qkv=gpt2_qkv,
        positions="learned",
        position_table="transformer.wpe",
        ln_mlp="ln_2",
        mlp="mlp",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        ln_final="gpt_neox.final_layer_norm",
        attn="attention",
        attn_out="attention",
        mlp_out="mlp",
        mid="post_attention_layernorm",
        w_o="attention.dense",
        read_qkv=neox_qkv,
        ln_mlp="post_attention_layernorm",
        mlp="mlp",
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        ln_final="model.decoder.final_layer_norm",
        attn="self_attn",
        attn_out="self_attn",
        mlp_out="fc2",
        mid="final_layer_norm",
        w_o="self_attn.out_proj",
        read_qkv=linear_qkv,
        positions="learned",
        position_table="model.decoder.embed_positions",
        position_offset=2,
        ln_mlp="final_layer_norm",
        w_q="self_attn.q_proj",
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "olmo": LLAMA,
    "olmo2": _OLMO2,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt_oss": LLAMA,
    "phi3": replace(LLAMA, read_qkv=phi3_qkv, w_q=None),
    # Text encoders; see ``workbench.models.encoders``.
    "clip_text_model": Family(
        blocks="encoder.layers",
        ln_final="final_layer_norm",
        attn="self_attn",
        attn_out="self_attn",
        mlp_out="mlp",
        mid="layer_norm2",
        w_o="self_attn.out_proj",
        read_qkv=linear_qkv,
        positions="learned",
        position_table="embeddings.position_embedding",
        ln_mlp="layer_norm2",
        mlp="mlp",
    ),
    "t5": Family(
        blocks="encoder.block",
        ln_final="encoder.final_layer_norm",
        attn="layer.0.SelfAttention",
        attn_out="layer.0.SelfAttention",
        mlp_out="layer.1.DenseReluDense",
        mid="layer.1",
        w_o="layer.0.SelfAttention.o",
        read_qkv=t5_qkv,
        positions="relative",
        ln_mlp="layer.1.layer_norm",
        mlp="layer.1.DenseReluDense",
    ),
    "mamba": MAMBA,
    "mamba2": MAMBA,
}

# Why the attention of these does not come through transformers' AttentionInterface, as measured:
# a switch of the implementation is ignored, in part silently.
OUTSIDE_THE_HOOK = ("falcon", "bloom", "gptj", "gpt_neo")


def family_of(model_type: str, config: Any) -> Family:
    """The family table's entry for a model type, adapted to the config.

    Raises:
        CapabilityError: The architecture does not go through the hook point, or is unknown.
    """
    if model_type in OUTSIDE_THE_HOOK:
        raise CapabilityError(
            f"the hf backend needs attention that runs through transformers' AttentionInterface; "
            f"{model_type} has its own; use --backend transformer-lens or nnsight"
        )
    if model_type not in FAMILIES:
        raise CapabilityError(
            f"the hf backend must know where an architecture keeps its residual stream; it knows "
            f"{', '.join(sorted(FAMILIES))}; got {model_type}; use --backend transformer-lens or nnsight"
        )
    family = FAMILIES[model_type]
    if model_type == "gpt_neox" and config.use_parallel_residual:
        return replace(family, mid=None)
    if model_type == "opt" and not config.do_layer_norm_before:
        raise CapabilityError(
            "the hf backend needs OPT with layer norm before each sublayer; this one (as OPT-350m) "
            "has it after, so its residual stream is not a sum; use --backend transformer-lens or nnsight"
        )
    return family
