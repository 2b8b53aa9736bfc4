"""The playground's work: two continuations of a prompt, their probabilities, where attention moved.

Whoever calls holds the model's lock: edits are switched on for the model as a whole.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import CapabilityError, DataError

if TYPE_CHECKING:
    from workbench.generation import Path

ALTERNATIVES = 5
"""Candidates kept of every step."""


@dataclass(frozen=True)
class Continuation:
    """What a model said, and how sure it was."""

    text: str
    ids: tuple[int, ...]
    """The new tokens."""
    tokens: tuple[str, ...]
    """The new tokens as texts."""
    probability: np.ndarray
    """Of each chosen token, ``[new]``."""
    candidates: tuple[tuple[tuple[str, float], ...], ...]
    """The likeliest tokens of each step with their probabilities."""


class Told:
    """Receives tokens while a model generates; transformers calls this a streamer."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def end(self) -> None:
        """Nothing is held back."""


def prompt_ids(model: Any, prompt: str, n_new: int) -> list[int]:
    """The prompt's tokens.

    Raises:
        DataError: Empty, or too long for the model with the new tokens.
    """
    if model.tokenizer is None:
        raise CapabilityError(
            "a prompt needs a tokenizer; this model has none; choose another model"
        )
    ids = list(model.tokenizer(prompt)["input_ids"])
    if not ids:
        raise DataError("a prompt must have at least one token; it is empty; write something")
    if len(ids) + n_new > model.spec.n_ctx:
        raise DataError(
            f"prompt and new tokens must fit in n_ctx = {model.spec.n_ctx}; got {len(ids)} + {n_new}; "
            "shorten the prompt or ask for fewer tokens"
        )
    return ids


def continue_prompt(
    model: Any, ids: list[int], n_new: int, edit: Any, tell: Callable[[str], None]
) -> Continuation:
    """Continue greedily, telling the text as it grows, then read the probabilities of each step."""
    import torch

    tokens = torch.tensor([ids])
    with _under(model, edit):
        options: dict[str, Any] = {"do_sample": False}
        if model.backend == "hf":
            options["streamer"] = Told(model.tokenizer, tell)
        whole = model.generate(tokens, max_new_tokens=n_new, **options)
        # One pass over prompt and answer gives every step's distribution, under the same edit.
        logits = model.logits(whole[:, :-1], last=whole.shape[1] - len(ids))[0]
    new = whole[0, len(ids) :]
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    tell(text)
    share = torch.softmax(logits.float(), dim=-1)
    best = share.topk(min(ALTERNATIVES, share.shape[-1]), dim=-1)
    name = model.tokenizer.decode
    candidates = tuple(
        tuple((name([index]), value) for value, index in zip(row, column, strict=True))
        for row, column in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    chosen = share.gather(-1, new[:, None].to(share.device))[:, 0]
    ids_of_new = tuple(new.tolist())
    texts = tuple(name([token]) for token in ids_of_new)
    return Continuation(text, ids_of_new, texts, chosen.cpu().numpy(), candidates)


def read_by_both(model: Any, ids: list[int], said: Continuation, edit: Any) -> "Path":
    """What both models say of every token of one continuation."""
    import torch

    from workbench import generation

    return generation.read_by_both(model, torch.tensor([[*ids, *said.ids]]), len(ids), edit)


def attention_of_last(model: Any, ids: list[int], edit: Any) -> np.ndarray:
    """Attention of the last token to every key, ``[layer head k_pos]``; patterns are never whole."""
    import torch

    from workbench.attention.rows import PatternRows
    from workbench.models.base import Site, require

    require(model, frozenset({"patterns"}), "looking at attention")
    sites = [Site("pattern", layer) for layer in range(model.spec.n_layers)]
    rows = PatternRows(torch.tensor([[len(ids) - 1]]))
    with _under(model, edit):
        found = model.capture(torch.tensor([ids]), sites, reduce={"pattern": rows})
    return np.stack([found[site][0, :, 0].cpu().numpy() for site in sites])


def moved(stock: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """How much attention of each head went elsewhere, 0 to 1: half the sum of differences."""
    distance: np.ndarray = 0.5 * np.abs(edited - stock).sum(axis=-1)
    return distance


@contextlib.contextmanager
def _under(model: Any, edit: Any) -> Iterator[None]:
    if edit is None:
        yield
        return
    with model.edit(edit):
        yield
