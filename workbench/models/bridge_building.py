"""From a transformers model to a TransformerBridge of it, proving that both give the same logits."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CapabilityError, ConfigError
from workbench.models.checkpoint import Source, load_transformers, quiet
from workbench.models.transformer_lens import TransformerLensModel


def bridge_of(model: Any, tokenizer: Any = None) -> Any:
    """A TransformerBridge on the same weights as a transformers model, which stays as it is.

    Raises:
        CapabilityError: See ``load_bridge``.
    """
    # The bridge replaces modules in place: they are copied, the parameters are shared.
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)
    with quiet():
        twin.set_attn_implementation("eager")
    return build_bridge(twin, tokenizer)


def build_bridge(model: Any, tokenizer: Any = None) -> Any:
    """Build a bridge around a model with eager attention, changing that model's modules.

    Raises:
        CapabilityError: See ``load_bridge``.
    """
    from transformer_lens.model_bridge.sources import (
        build_bridge_from_module,
        detect_tokenizer_bos_eos,
    )

    n_pos = min(16, getattr(model.config, "max_position_embeddings", None) or 16)
    tokens = (torch.arange(n_pos)[None] * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        wanted = model(tokens).logits.float()
    name = model.config.name_or_path or model.config.model_type
    try:
        bridge = build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config, model_name=name
        )
        with torch.no_grad():
            got = bridge(tokens, return_type="logits").float()
    except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CapabilityError(
            f"TransformerLens must know the architecture; it cannot bridge this {model.config.model_type} "
            f"({reason}); use --backend nnsight, or hf where it takes the model"
        ) from error
    _refuse_difference(got, wanted, model)
    if tokenizer is not None:
        # Not through the builder: it fetches the tokenizer again by name to have it add BOS.
        own = copy.deepcopy(tokenizer)
        if own.pad_token is None:  # the bridge pads every prompt, a single one too
            own.pad_token = own.eos_token or own.bos_token
        bridge.tokenizer = own
        prepends, appends = detect_tokenizer_bos_eos(tokenizer)
        bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = prepends, appends
    return bridge


def _refuse_difference(got: Tensor, wanted: Tensor, model: Any) -> None:
    exact = model.dtype == torch.float32
    bound = (1e-4 if exact else 5e-2) * max(1.0, float(wanted.abs().max()))
    difference = float((got - wanted).abs().max())
    if not difference <= bound:
        raise CapabilityError(
            f"the bridge's logits must be the model's within {bound:.1e}; for this {model.config.model_type} "
            f"they differ by {difference:.1e}; use --backend hf or nnsight"
        )


def load_bridge(source: Source) -> TransformerLensModel:
    """Load a checkpoint and build its bridge, proving that both give the same logits.

    Raises:
        ConfigError: A kernel other than eager was asked for.
        CapabilityError: TransformerLens does not take the architecture, or changes its numbers.
    """
    if source.attn_implementation not in (None, "eager"):
        raise ConfigError(
            f"the transformer-lens backend runs eager attention only; got {source.attn_implementation}; "
            "leave attn_implementation out, or use --backend hf"
        )
    model, tokenizer, identity = load_transformers(replace(source, attn_implementation="eager"))
    bridge = build_bridge(model, tokenizer)
    return TransformerLensModel(bridge, tokenizer, name=identity.name, revision=identity.revision)
