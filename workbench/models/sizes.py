"""The sizes of a transformers model, from its config and its modules."""

from typing import Any

from workbench.models.base import ModelSpec
from workbench.models.families import Family


def make_spec(model: Any, family: Family, *, name: str, revision: str) -> ModelSpec:
    """Read a model's sizes; a config says them in the words of its architecture.

    Args:
        model: A ``PreTrainedModel``.
        family: Where it keeps its parts.
        name: What people call it; "": what its config says.
        revision: Hub commit or hash of the weights.
    """
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads if family.attn else 0
    d_head = getattr(config, "head_dim", None) or (config.hidden_size // n_heads if n_heads else 0)
    d_mlp = next(
        (
            size
            for key in ("intermediate_size", "n_inner", "ffn_dim")
            if (size := getattr(config, key, None)) is not None
        ),
        4 * config.hidden_size,
    )
    return ModelSpec(
        # Only the last part of a path: results must not tell where a folder lies.
        name=name or (config.name_or_path or config.model_type).rstrip("/").split("/")[-1],
        revision=revision,
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=(getattr(config, "num_key_value_heads", None) or n_heads) if n_heads else 0,
        d_model=config.hidden_size,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=model.get_input_embeddings().weight.shape[0],
        n_ctx=getattr(config, "max_position_embeddings", None) or 1 << 30,
        positions=family.positions,
    )
