"""A continuation without and with an intervention, token by token, and where the attention moved."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.statistics import SinkMass
from workbench.errors import DataError, ModelError
from workbench.models.base import ModelAdapter, Site


@dataclass(frozen=True)
class Path:
    """One continuation, read by both models."""

    text: str
    tokens: Int[Tensor, " new"]
    probability_stock: Float[Tensor, " new"]
    """Of every token of this continuation under the stock model."""
    probability_edited: Float[Tensor, " new"]
    entropy_stock: Float[Tensor, " new"]
    """Of the next-token distribution where each token was chosen, in nats."""
    entropy_edited: Float[Tensor, " new"]
    total_variation: Float[Tensor, " new"]
    """Half the summed difference of the two distributions, in [0, 1]."""


@dataclass(frozen=True)
class Comparison:
    """Two greedy continuations of one prompt."""

    prompt: str
    stock: Path
    edited: Path
    sink_mass_stock: Float[Tensor, " layer"] | None
    """Attention to the first token, mean over heads and queries of the prompt after it, under the
    stock model; None: the backend hands over no patterns."""
    sink_mass_edited: Float[Tensor, " layer"] | None

    def document(self) -> dict[str, Any]:
        """Everything as JSON data."""
        masses = {
            name: None if mass is None else mass.tolist()
            for name, mass in (("stock", self.sink_mass_stock), ("edited", self.sink_mass_edited))
        }
        return {
            "prompt": self.prompt,
            "stock": _path_document(self.stock),
            "edited": _path_document(self.edited),
            "sink_mass": masses,
        }


def _path_document(path: Path) -> dict[str, Any]:
    values = vars(path)
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def compare_generation(
    model: ModelAdapter, prompt: str, intervention: Any, max_new_tokens: int = 64
) -> Comparison:
    """Continue a prompt greedily without and with an intervention, and read both with both models.

    Args:
        model: Interventions that are already active on it belong to "stock".
        prompt: The text.
        intervention: What ``model.edit`` takes.
        max_new_tokens: Of each continuation, at most.

    Raises:
        ModelError: The model has no tokenizer.
        DataError: An empty prompt.
    """
    if model.tokenizer is None:
        raise ModelError(f"a text prompt needs a tokenizer; {model.spec.name} has none")
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    if not ids.numel():
        raise DataError("a prompt must have at least one token; got an empty text; write something")

    def continued(edit: Any) -> Int[Tensor, "one pos"]:
        with nullcontext() if edit is None else model.edit(edit):
            tokens: Tensor = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
        return tokens

    return Comparison(
        prompt,
        read_by_both(model, continued(None), ids.shape[1], intervention),
        read_by_both(model, continued(intervention), ids.shape[1], intervention),
        sink_mass(model, ids, None),
        sink_mass(model, ids, intervention),
    )


def read_by_both(
    model: ModelAdapter, whole: Int[Tensor, "one pos"], n_prompt: int, intervention: Any
) -> Path:
    """Distributions of both models along one text, teacher-forced.

    Args:
        model: Interventions that are already active on it belong to "stock".
        whole: Prompt and continuation.
        n_prompt: Tokens of the prompt.
        intervention: What ``model.edit`` takes.
    """
    new = whole[0, n_prompt:]

    def log_probs() -> Float[Tensor, "new d_vocab"]:
        return model.logits(whole[:, :-1], last=len(new))[0].log_softmax(dim=-1)

    stock = log_probs()
    with model.edit(intervention):
        edited = log_probs()

    def probability(rows: Tensor) -> Tensor:
        return rows.gather(-1, new[:, None])[:, 0].exp()

    def entropy(rows: Tensor) -> Tensor:
        return -(rows.exp() * rows).sum(dim=-1)

    return Path(
        model.tokenizer.decode(new, skip_special_tokens=True),
        new,
        probability(stock),
        probability(edited),
        entropy(stock),
        entropy(edited),
        0.5 * (stock.exp() - edited.exp()).abs().sum(dim=-1),
    )


def sink_mass(
    model: ModelAdapter, tokens: Int[Tensor, "one pos"], intervention: Any
) -> Float[Tensor, " layer"] | None:
    """Attention to the first token, mean over heads and the queries after it; None: no patterns."""
    if "patterns" not in model.capabilities or tokens.shape[1] < 2:
        return None
    sites = [Site("pattern", layer) for layer in range(model.spec.n_layers)]
    with nullcontext() if intervention is None else model.edit(intervention):
        found = model.capture(tokens, sites, SinkMass((0,)))
    return torch.stack([found[site][0, :, 1:].mean() for site in sites])
