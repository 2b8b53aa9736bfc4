"""A toy model as a folder of transformers, where one of its architectures computes the same.

    pre-norm, learned positions or none   GPT-2      (no positions: its table is 0)
    pre-norm, rotary positions            GPT-NeoX   (whole heads turned, blocks in sequence)
    post-norm, learned positions or none  OPT        (``do_layer_norm_before`` false)

with a ReLU MLP, no tied embeddings, and every bias that the toy does not have set to 0. A toy
without an MLP gets one of a single neuron whose weights are 0. ``softmax-scale`` multiplies the
values by its row sum, and a value bias is the bias of W_V, because rows of softmax sum to 1: logits
and z are the toy's; ``softmax-scale`` patterns are the toy's over the row sum. Other kernels,
learned keys and sink tokens have no architecture that computes them, and are refused.

Nothing of transformers is imported: the folder is a config.json and a model.safetensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CapabilityError, ModelError

Weights = dict[str, Tensor]

FOLDER = "transformers"
"""Beside the toy's own files."""
NORM_EPS = 1e-5
"""Of torch's LayerNorm, which the toys use."""
_KERNELS = ("softmax", "softmax-scale")
_BIASES = ("none", "value")


def write_transformers(folder: str | Path) -> Path:
    """Write ``DIR/transformers`` beside a trained toy; its logits are the toy's.

    Args:
        folder: Of the toy, with config.json and model.safetensors.

    Returns:
        The folder, which ``AutoModelForCausalLM.from_pretrained`` loads.

    Raises:
        CapabilityError: No architecture computes what this variant does; says which part.
        ModelError: The toy is unfinished or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    try:
        described = json.loads((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        config, converted = as_transformers(described, weights)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"a toy must have a whole config.json and model.safetensors; in {folder} they are not "
            f"({str(error).strip().splitlines()[0]}); train it again"
        ) from error
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    fresh = out / "model.part"
    save_file({name: x.contiguous() for name, x in converted.items()}, fresh, {"format": "pt"})
    fresh.replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return out


def as_transformers(
    described: Mapping[str, Any], weights: Weights
) -> tuple[dict[str, Any], Weights]:
    """Turn a toy's config.json and weights into those of a transformers architecture.

    Raises:
        CapabilityError: There is none that computes the same.
    """
    reason = refusal(described)
    if reason:
        raise CapabilityError(
            f"a transformers folder must compute what the toy does; {reason}; load it as toy:DIR"
        )
    sizes = described["sizes"]
    convert = _opt if sizes["norm"] == "post" else _gpt2
    if sizes["positions"] == "rotary":
        convert = _gpt_neox
    config, converted = convert(sizes, _completed(weights, sizes))
    tokens = described.get("tokens", ())
    shared = {
        "vocab_size": sizes["d_vocab"],
        "bos_token_id": tokens.index("<s>") if "<s>" in tokens else None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "dtype": str(weights["embed.weight"].dtype).removeprefix("torch."),
    }
    return config | shared, converted


def refusal(described: Mapping[str, Any]) -> str:
    """Why no architecture computes what a toy does; "": one does."""
    if described.get("model_type") != "toy":
        kind = described.get("model_type")
        if kind == "scan-snap":
            return "no architecture hides a query from itself as scan-snap does"
        return f"{kind} is no toy transformer"
    sizes = described["sizes"]
    if sizes["attention"] not in _KERNELS:
        return f"no architecture has attention={sizes['attention']}"
    if sizes["bias"] not in _BIASES:
        return f"no architecture has bias={sizes['bias']}"
    if sizes["norm"] == "post" and sizes["positions"] == "rotary":
        return "no architecture has norm=post with positions=rotary"
    if sizes["norm"] == "post" and not sizes["d_mlp"]:
        return "no architecture has norm=post without an MLP"
    return ""


def _completed(weights: Weights, sizes: Mapping[str, Any]) -> Weights:
    """The toy's weights, with zeros for what only the architectures have."""
    width, like = sizes["d_model"], weights["embed.weight"]
    full = dict(weights)
    if sizes["positions"] == "none":
        full["position.weight"] = like.new_zeros(sizes["n_ctx"], width)
    for layer in range(sizes["n_layers"]):
        block = f"blocks.{layer}."
        bias = full.get(f"{block}attention.v_bias", like.new_zeros(width))
        full[f"{block}attention.b_V"] = bias.flatten()
        scale = sizes["row_sum"] if sizes["attention"] == "softmax-scale" else 1.0
        full[f"{block}attention.W_V.weight"] = scale * full[f"{block}attention.W_V.weight"]
        if not sizes["d_mlp"]:
            full[f"{block}mlp.0.weight"] = like.new_zeros(1, width)
            full[f"{block}mlp.2.weight"] = like.new_zeros(width, 1)
            full[f"{block}ln_mlp.weight"] = like.new_ones(width)
            full[f"{block}ln_mlp.bias"] = like.new_zeros(width)
    return full


def _norm(weights: Weights, ours: str, theirs: str) -> Weights:
    return {f"{theirs}.{part}": weights[f"{ours}.{part}"] for part in ("weight", "bias")}


def _linear(theirs: str, weight: Tensor, bias: Tensor | None = None) -> Weights:
    zeros = weight.new_zeros(weight.shape[0])
    return {f"{theirs}.weight": weight, f"{theirs}.bias": zeros if bias is None else bias}


def _transposed(theirs: str, weight: Tensor, bias: Tensor | None = None) -> Weights:
    """As GPT-2's Conv1D keeps it: input by output."""
    made = _linear(theirs, weight, bias)
    return made | {f"{theirs}.weight": weight.T}


def _gpt2(sizes: Mapping[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": sizes["d_model"],
        "n_layer": sizes["n_layers"],
        "n_head": sizes["n_heads"],
        "n_inner": max(sizes["d_mlp"], 1),
        "n_positions": sizes["n_ctx"],
        "activation_function": "relu",
        "layer_norm_epsilon": NORM_EPS,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    made = {
        "transformer.wte.weight": weights["embed.weight"],
        "transformer.wpe.weight": weights["position.weight"],
        **_norm(weights, "ln_final", "transformer.ln_f"),
        "lm_head.weight": weights["unembed.weight"],
    }
    for layer in range(sizes["n_layers"]):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        qkv = torch.cat([weights[f"{ours}.attention.W_{name}.weight"] for name in "QKV"])
        zeros = qkv.new_zeros(2 * sizes["d_model"])
        bias = torch.cat([zeros, weights[f"{ours}.attention.b_V"]])
        made |= _norm(weights, f"{ours}.ln_attn", f"{theirs}.ln_1")
        made |= _norm(weights, f"{ours}.ln_mlp", f"{theirs}.ln_2")
        made |= _transposed(f"{theirs}.attn.c_attn", qkv, bias)
        made |= _transposed(f"{theirs}.attn.c_proj", weights[f"{ours}.attention.W_O.weight"])
        made |= _transposed(f"{theirs}.mlp.c_fc", weights[f"{ours}.mlp.0.weight"])
        made |= _transposed(f"{theirs}.mlp.c_proj", weights[f"{ours}.mlp.2.weight"])
    return config, made


def _gpt_neox(sizes: Mapping[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": sizes["d_model"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "intermediate_size": max(sizes["d_mlp"], 1),
        "max_position_embeddings": sizes["n_ctx"],
        "hidden_act": "relu",
        "layer_norm_eps": NORM_EPS,
        "use_parallel_residual": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    }
    made = {
        "gpt_neox.embed_in.weight": weights["embed.weight"],
        **_norm(weights, "ln_final", "gpt_neox.final_layer_norm"),
        "embed_out.weight": weights["unembed.weight"],
    }
    for layer in range(sizes["n_layers"]):
        ours, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        made |= _norm(weights, f"{ours}.ln_attn", f"{theirs}.input_layernorm")
        made |= _norm(weights, f"{ours}.ln_mlp", f"{theirs}.post_attention_layernorm")
        made |= _by_head(weights, ours, f"{theirs}.attention.query_key_value", sizes["n_heads"])
        out = weights[f"{ours}.attention.W_O.weight"]
        made |= _linear(f"{theirs}.attention.dense", out)
        made |= _linear(f"{theirs}.mlp.dense_h_to_4h", weights[f"{ours}.mlp.0.weight"])
        made |= _linear(f"{theirs}.mlp.dense_4h_to_h", weights[f"{ours}.mlp.2.weight"])
    return config, made


def _by_head(weights: Weights, ours: str, theirs: str, n_heads: int) -> Weights:
    """Queries, keys and values of a head stand together."""
    parts = [weights[f"{ours}.attention.W_{name}.weight"] for name in "QKV"]
    qkv = torch.stack([part.unflatten(0, (n_heads, -1)) for part in parts], dim=1)
    bias = torch.zeros_like(qkv[..., 0])
    bias[:, 2] = weights[f"{ours}.attention.b_V"].view(n_heads, -1)
    return _linear(theirs, qkv.flatten(0, 2), bias.flatten())


def _opt(sizes: Mapping[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    width = sizes["d_model"]
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "ffn_dim": sizes["d_mlp"],
        "max_position_embeddings": sizes["n_ctx"],
        "activation_function": "relu",
        "do_layer_norm_before": False,
        "dropout": 0.0,
    }
    # OPT's table has two rows before that of position 0.
    table = weights["position.weight"]
    made = {
        "model.decoder.embed_tokens.weight": weights["embed.weight"],
        "model.decoder.embed_positions.weight": torch.cat([table.new_zeros(2, width), table]),
        "lm_head.weight": weights["unembed.weight"],
    }
    for layer in range(sizes["n_layers"]):
        ours, theirs = f"blocks.{layer}", f"model.decoder.layers.{layer}"
        names = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "out_proj"}
        for name, its in names.items():
            bias = weights[f"{ours}.attention.b_V"] if name == "W_V" else None
            matrix = weights[f"{ours}.attention.{name}.weight"]
            made |= _linear(f"{theirs}.self_attn.{its}", matrix, bias)
        made |= _norm(weights, f"{ours}.ln_attn", f"{theirs}.self_attn_layer_norm")
        made |= _norm(weights, f"{ours}.ln_mlp", f"{theirs}.final_layer_norm")
        made |= _linear(f"{theirs}.fc1", weights[f"{ours}.mlp.0.weight"])
        made |= _linear(f"{theirs}.fc2", weights[f"{ours}.mlp.2.weight"])
    return config, made
