"""Text in, text out: what ``generate`` does around a model's own token loop."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import ConfigError, DataError, ModelError
from workbench.models.base import ModelAdapter
from workbench.models.generating import check_generation

Run = Callable[[Tensor, Tensor | None, dict[str, Any]], Tensor]
"""(tokens, attention_mask, options) -> tokens with the prompt."""


def generate_with(
    model: ModelAdapter,
    run: Run,
    prompt: Any,
    max_new_tokens: int,
    options: dict[str, Any],
    *,
    defaults: Any = None,
) -> Any:
    """Generate from a text, several texts or tokens.

    Args:
        model: Gives tokenizer and sizes.
        run: The token loop.
        prompt: A text (returns its continuation), a list of texts (returns theirs), or tokens
            ``[batch pos]`` (returns tokens with the prompt, as transformers does).
        max_new_tokens: At least 1.
        options: ``attention_mask`` and the sampling arguments of transformers' ``generate``.
        defaults: The model's generation config, if it has one.

    Raises:
        ConfigError: A way of generating under which an active edit would not be exact.
        DataError: Prompt and new tokens exceed n_ctx of a model with learned positions.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    texts = [prompt] if isinstance(prompt, str) else prompt
    is_text = isinstance(texts, list | tuple) and bool(texts) and isinstance(texts[0], str)
    if is_text:
        tokens, mask = _encode(model, list(texts))
    else:
        tokens, mask = torch.as_tensor(prompt), options.pop("attention_mask", None)
    total = tokens.shape[-1] + max_new_tokens
    if model.spec.positions == "learned" and total > model.spec.n_ctx:
        raise DataError(
            f"prompt and new tokens must fit in n_ctx = {model.spec.n_ctx} of {model.spec.name}; got "
            f"{tokens.shape[-1]} + {max_new_tokens}; shorten the prompt or lower max_new_tokens"
        )
    check_generation(model.interventions, options, defaults)
    output = run(tokens, mask, {"max_new_tokens": max_new_tokens, **options})
    if not is_text:
        return output
    new = output[:, tokens.shape[1] :]
    decoded = [model.tokenizer.decode(row, skip_special_tokens=True) for row in new]
    return decoded[0] if isinstance(prompt, str) else decoded


def _encode(model: ModelAdapter, texts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Tokenise with padding on the left, so that every prompt ends where generation begins."""
    if model.tokenizer is None:
        raise ModelError(
            f"a text prompt needs a tokenizer; {model.spec.name} has none; give tokens [batch pos], or "
            "load it with wb.wrap(model, tokenizer=...)"
        )
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    if not all(rows):
        raise DataError("a prompt must have at least one token; got an empty text; write something")
    longest = max(map(len, rows))
    tokens = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows])
    if all(len(row) == longest for row in rows):
        return tokens, None
    return tokens, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def token_loop(
    model: Any,
    device: torch.device,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    options: dict[str, Any],
) -> Int[Tensor, "returned longer"]:
    """Run transformers' own ``generate``; returns tokens with the prompts, on the CPU.

    One row a prompt, or as many as ``num_return_sequences`` says.

    Args:
        model: An adapter around a transformers model.
        device: Where its forward pass begins.
        tokens: The prompts.
        attention_mask: 1 where a token is; None: everywhere.
        options: Of ``generate``; without ``pad_token_id`` one is chosen.
    """
    options = {
        "pad_token_id": _pad_token(model.tokenizer, model.model.generation_config),
        **options,
    }
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    output: Tensor = model.model.generate(
        tokens.to(device), attention_mask=mask.to(device), **options
    )
    return output.cpu()


def _pad_token(tokenizer: Any, generation_config: Any) -> int:
    """A padding id for ``generate``: the tokenizer's, else the end-of-sequence id, else 0."""
    for candidate in (
        getattr(tokenizer, "pad_token_id", None),
        generation_config.pad_token_id,
        generation_config.eos_token_id,
    ):
        if isinstance(candidate, int):
            return candidate
        if isinstance(candidate, list) and candidate:
            return int(candidate[0])
    return 0
