"""Tiny random models of every architecture: 2 layers, d_model 32, about 100 tokens.

Weights are large (std 0.3 and more; norms and biases too), so that a wrong scale, a forgotten
norm or a dropped window shows in the logits. Windows are shorter than ``PROMPT_LENGTH``.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

PROMPT_LENGTH = 12
WINDOW = 5
D_VOCAB = 101

_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": D_VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GEMMA = {**_LLAMA, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
_LAYERS = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt_neox": {
        **_SIZES,
        "intermediate_size": 48,
        "rotary_pct": 0.5,
        "use_parallel_residual": True,
    },
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": WINDOW},
    "qwen2": {**_LLAMA, "use_sliding_window": False},
    "qwen3": {**_LLAMA, "head_dim": 12, "use_sliding_window": False},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "gemma2": {
        **_GEMMA,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "layer_types": _LAYERS,
    },
    "gemma3_text": {**_GEMMA, "layer_types": _LAYERS},
    "phi3": {**_LLAMA, "sliding_window": None},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": _LAYERS,
    },
    "mamba": {
        "vocab_size": D_VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    },
    "falcon": {key: value for key, value in _SIZES.items() if key != "max_position_embeddings"},
    "bloom": {
        "vocab_size": D_VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": D_VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["local", "global"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}

REFUSED_BY_HF = ("falcon", "bloom", "gptj", "gpt_neo")
"""Their attention does not run through transformers' AttentionInterface."""
ATTENTION_FAMILIES = tuple(f for f in CONFIGS if f not in (*REFUSED_BY_HF, "mamba"))
"""The families that the hf backend reads inside attention."""
FAMILIES = (*ATTENTION_FAMILIES, "mamba")
"""All that the hf backend takes."""
ALL_FAMILIES = tuple(CONFIGS)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers causal language model of one family, random weights, eval mode, float32.

    Args:
        family: The model type of transformers, a key of ``CONFIGS``.
        seed: Of the weights; the global random state is left as it was.
        changes: Config values that differ from the table, or ``attn_implementation``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kernel = changes.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {} if kernel is None else {"attn_implementation": kernel}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        _perturb(model)
    return model.eval()


def _perturb(model: torch.nn.Module) -> None:
    """Give biases, norms and learned sinks values that no default would give."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = parameter.dim() == 1 or "bias" in name.split(".")[-1]
            if small and not name.endswith((".D", "dt_proj.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(("gate_up_proj", "down_proj")) and parameter.dim() == 3:
                # GPT-OSS leaves its experts small.
                parameter.copy_(0.3 * torch.randn_like(parameter))


def random_tokens(
    n_prompts: int = 2, n_pos: int = PROMPT_LENGTH, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """Token ids that avoid the special ones (0, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n_prompts, n_pos), generator=generator)


def padded(
    tokens: Int[Tensor, "batch pos"], lengths: list[int], side: str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Cut each prompt to its length and pad it on one side with token 2: tokens and mask."""
    out = torch.full_like(tokens, 2)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(tokens.shape[1] - length, None)
        out[row, where] = tokens[row, :length]
        mask[row, where] = 1
    return out, mask
