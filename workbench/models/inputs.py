"""Tokens and masks on their way into a model: checked, and completed with positions."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter, ModelSpec


@dataclass(frozen=True)
class Inputs:
    """What one forward pass is given."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None
    """None when nothing is padded and positions are the usual ones: kernels then skip the mask."""
    position_ids: Int[Tensor, "batch pos"] | None

    def row_valid(self, device: torch.device) -> Float[Tensor, "batch pos"] | None:
        """1 for real tokens, 0 for padding; None: no padding."""
        return None if self.attention_mask is None else self.attention_mask.float().to(device)

    def first_key(self) -> Int[Tensor, " batch"] | None:
        """Index of every prompt's first real token; None: 0 for all."""
        mask = self.attention_mask
        if mask is None or bool(mask[:, 0].all()):
            return None
        return mask.argmax(dim=1)


def device_of(model: ModelAdapter) -> torch.device:
    """Where a model's first weights lie; the CPU for one without."""
    network = getattr(model, "model", None)
    first = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def prepare_inputs(
    spec: ModelSpec,
    tokens: Any,
    attention_mask: Any = None,
    position_ids: Int[Tensor, "batch pos"] | None = None,
) -> Inputs:
    """Check tokens and mask against the model; left padding gets its position ids.

    Raises:
        DataError: Wrong shape or type, ids outside the vocabulary, too long, a mask with holes.
    """
    tokens = _check_tokens(spec, torch.as_tensor(tokens))
    mask = _check_mask(tokens, attention_mask)
    if mask is not None and position_ids is None and not bool(mask[:, 0].all()):
        # Learned positions count from a prompt's first real token, not from the padding.
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if position_ids is not None and mask is None:
        # Without a mask, transformers takes positions that do not ascend for several prompts packed
        # into one, and silently hides them from each other.
        mask = torch.ones_like(tokens)
    return Inputs(tokens, mask, position_ids)


def mask_and_positions(
    spec: ModelSpec, inputs: Inputs, device: torch.device, *, takes_positions: bool
) -> dict[str, Int[Tensor, "batch pos"]]:
    """The keyword arguments of a transformers model that say where tokens are and stand.

    Args:
        spec: The model's sizes.
        inputs: Of the forward pass.
        device: Where it begins.
        takes_positions: Whether the model's ``forward`` has ``position_ids``.

    Raises:
        CapabilityError: Positions are given and the model takes none.
    """
    arguments = {}
    if inputs.attention_mask is not None:
        arguments["attention_mask"] = inputs.attention_mask.to(device)
    if inputs.position_ids is not None and takes_positions:
        arguments["position_ids"] = inputs.position_ids.to(device)
    elif inputs.position_ids is not None and spec.positions != "alibi":
        # ALiBi counts real tokens by itself; a state-space model would read the padding.
        raise CapabilityError(
            f"explicit positions and left padding need a model that takes position ids; {spec.family} "
            "does not; pad on the right"
        )
    return arguments


def _check_tokens(spec: ModelSpec, tokens: Tensor) -> Int[Tensor, "batch pos"]:
    if (
        tokens.dim() != 2
        or tokens.numel() == 0
        or tokens.is_floating_point()
        or tokens.dtype == torch.bool
    ):
        raise DataError(
            f"tokens must be int64 [batch pos] with at least one token; got {tokens.dtype} "
            f"{list(tokens.shape)}; a single prompt is tokens[None]"
        )
    if tokens.shape[1] > spec.n_ctx:
        raise DataError(
            f"a prompt must have at most n_ctx = {spec.n_ctx} tokens for {spec.name}; got "
            f"{tokens.shape[1]}; cut it first"
        )
    outside = (tokens < 0) | (tokens >= spec.d_vocab)
    if bool(outside.any()):
        row, pos = outside.nonzero()[0].tolist()
        raise DataError(
            f"token ids must lie in 0 ... {spec.d_vocab - 1}, the vocabulary of {spec.name}; got "
            f"{int(tokens[row, pos])} in prompt {row} at position {pos}; use this model's tokenizer"
        )
    return tokens.long().cpu()


def _check_mask(tokens: Tensor, attention_mask: Any) -> Int[Tensor, "batch pos"] | None:
    if attention_mask is None:
        return None
    mask = torch.as_tensor(attention_mask).long().cpu()
    if mask.shape != tokens.shape:
        raise DataError(
            f"attention_mask must have the shape of tokens, {list(tokens.shape)}; got {list(mask.shape)}"
        )
    # One run of ones a row: a change up at most once (from an assumed 0 before the row).
    starts = (mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).sum(dim=1)
    if bool((starts != 1).any()) or bool(((mask != 0) & (mask != 1)).any()):
        row = int((starts != 1).nonzero()[0]) if bool((starts != 1).any()) else 0
        raise DataError(
            "attention_mask must be 0 and 1 with padding at one or both ends only and at least one "
            f"real token a prompt; prompt {row} is not so; remove holes"
        )
    return None if bool((mask == 1).all()) else mask
