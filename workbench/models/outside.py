"""Architectures that the hf backend refuses and the other backends can read.

Their attention does not run through transformers' AttentionInterface, but their residual stream
can be read from outside: the table has the same form as the one in ``families``.
"""

from dataclasses import replace
from typing import Any

from workbench.models.base import ModelSpec
from workbench.models.families import FAMILIES, Family
from workbench.models.sizes import make_spec

_GPTJ = Family(
    blocks="transformer.h",
    ln_final="transformer.ln_f",
    attn="attn",
    attn_out="attn",
    mlp_out="mlp",
    mid=None,  # attention and MLP are parallel
    w_o="attn.out_proj",
    read_qkv=None,
)

OUTSIDE_FAMILIES: dict[str, Family] = {
    "gptj": _GPTJ,
    "gpt_neo": replace(
        _GPTJ,
        mid="ln_2",
        w_o="attn.attention.out_proj",
        positions="learned",
        position_table="transformer.wpe",
    ),
    # Bloom's attention and MLP add the residual stream themselves; their last layers do not.
    "bloom": replace(
        _GPTJ,
        attn="self_attention",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        mid="post_attention_layernorm",
        w_o="self_attention.dense",
        positions="alibi",
    ),
    "falcon": replace(
        _GPTJ, attn="self_attention", attn_out="self_attention", w_o="self_attention.dense"
    ),
}


def layout_of(config: Any) -> Family | None:
    """Module paths of an architecture, from either table; None: unknown.

    Args:
        config: A transformers config (the text part).
    """
    kind = config.model_type
    if kind == "falcon":
        positions = "alibi" if config.alibi else "rotary"
        parallel = config.parallel_attn or config.new_decoder_architecture
        mid = None if parallel else "post_attention_layernorm"
        return replace(OUTSIDE_FAMILIES[kind], positions=positions, mid=mid)
    if kind == "gpt_neox" and config.use_parallel_residual:
        return replace(FAMILIES[kind], mid=None)
    if kind == "opt" and not config.do_layer_norm_before:
        return None  # the norm comes after the sum: the table's places mean something else
    if kind == "bloom" and config.apply_residual_connection_post_layernorm:
        return None
    return FAMILIES.get(kind) or OUTSIDE_FAMILIES.get(kind)


def spec_of(model: Any, family: Family, *, name: str, revision: str) -> ModelSpec:
    """Sizes as ``make_spec`` reads them, also for the architectures of this file."""
    spec = make_spec(model, family, name=name, revision=revision)
    config = model.config.get_text_config()
    if config.model_type != "falcon":
        return spec
    # Falcon keeps a count of key-value heads that holds only in its newer layout.
    if config.new_decoder_architecture:
        return replace(spec, n_kv_heads=config.num_kv_heads)
    return replace(spec, n_kv_heads=1 if config.multi_query else spec.n_heads)
