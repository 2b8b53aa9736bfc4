"""The effective OV circuit of every head, how often it finds the next item, and where it leans.

With rows as vectors, R[s] the representation of token s after the first MLP,

    L = R W_V W_O W_U        [source, candidate], biases and norms left out

A pair (s, t) is found when L[s, t] is above L[s, t'] for every other candidate t' of its form: a
tie is not found. The score is the share of pairs found, pooled or per task. No d_model x d_model
product is made: R W_V and W_O W_U are d_head wide.

The greater-than bias of a head is, over sources s of series that do not wrap around,

    mean over s of (mean over j > s of L[s, j] - mean over j < s of L[s, j]) / std over j of L[s, j]

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.successor_heads_tokens import TokenSet
from workbench.errors import CapabilityError, EngineError
from workbench.models.base import ModelAdapter
from workbench.models.sublayers import HasSublayers


@dataclass(frozen=True)
class TokenPath:
    """How a token reaches a head: which of the first block's parts it passes."""

    mlp0: bool = True
    """False: the bare embedding, the control."""
    norm: bool = True
    """The norm before that MLP."""
    residual: bool = False
    """Add the embedding to what the MLP makes of it."""

    def represent(
        self, model: ModelAdapter, ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """What a head reads of each token.

        Raises:
            CapabilityError: The model cannot apply its MLP to any vector.
        """
        embedded = model.weight("W_E")[ids]
        if not self.mlp0:
            return embedded
        if not isinstance(model, HasSublayers):
            raise CapabilityError(
                "the effective OV circuit needs a model that can apply its first MLP to a vector "
                f"(mlp_of_embedding); {model.spec.name} on {model.backend} cannot; use mlp0=false"
            )
        out = model.mlp_of_embedding(0, embedded, norm=self.norm)
        return out + embedded if self.residual else out


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of all scored sets, one after the other, in the model's terms."""

    sets: tuple[TokenSet, ...]
    reps: Float[Tensor, "token d_model"]
    unembed: Float[Tensor, "d_model token"]

    def rows(self, number: int) -> slice:
        """Where the tokens of one set stand."""
        start = sum(len(one.ids) for one in self.sets[:number])
        return slice(start, start + len(self.sets[number].ids))

    def rows_of(self, wanted: TokenSet) -> slice:
        """Where the tokens of a set stand, found by the set."""
        return self.rows(self.sets.index(wanted))


def vocabulary_of(model: ModelAdapter, sets: Sequence[TokenSet], path: TokenPath) -> Vocabulary:
    """Represent and unembed every token of the sets.

    Raises:
        EngineError: A representation is not finite.
    """
    ids = torch.tensor([token for one in sets for token in one.ids])
    reps = path.represent(model, ids)
    if not reps.isfinite().all():
        raise EngineError(
            f"what the first MLP of {model.spec.name} makes of tokens must be finite; it is not; "
            "try --dtype float32"
        )
    return Vocabulary(tuple(sets), reps, model.weight("W_U")[:, ids])


# Mathematics: tensors in, tensors out


def ov_logits(
    reps: Float[Tensor, "source d_model"],
    w_v: Float[Tensor, "head d_model d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    unembed: Float[Tensor, "d_model token"],
) -> Float[Tensor, "head source token"]:
    """L of every head, through d_head: never d_model x d_model."""
    return _into_head(reps, w_v) @ _out_of_head(w_o, unembed)


def _into_head(reps: Tensor, w_v: Tensor) -> Float[Tensor, "head source d_head"]:
    return torch.einsum("sd,hde->hse", reps, w_v)


def _out_of_head(w_o: Tensor, unembed: Tensor) -> Float[Tensor, "head d_head token"]:
    return torch.einsum("hed,dt->het", w_o, unembed)


def is_strict_maximum(
    logits: Float[Tensor, "*head source candidate"], target: Int[Tensor, " source"]
) -> Bool[Tensor, "*head source"]:
    """Whether each source's target is above all other candidates; a tie is not."""
    column = target.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, column, -torch.inf).amax(dim=-1)
    return logits.gather(-1, column)[..., 0] > others


def greater_than(
    logits: Float[Tensor, "*head source candidate"],
) -> Float[Tensor, "*head inner_source"]:
    """Mean logit of larger minus of smaller items, in standard deviations of the source's logits.

    Rows and columns are the same items in order; the first and the last source are left out.
    """
    n_items = logits.shape[-1]
    larger = torch.ones(n_items, n_items).triu(1)[1:-1]
    smaller = torch.ones(n_items, n_items).tril(-1)[1:-1]
    inner = logits[..., 1:-1, :]
    difference = _mean_where(inner, larger) - _mean_where(inner, smaller)
    spread = inner.std(dim=-1, correction=0)
    return torch.where(spread > 0, difference / spread.clamp(min=1e-30), 0.0)


def _mean_where(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum(dim=-1) / weight.sum(dim=-1)


# One layer


def score_layer(
    model: ModelAdapter, layer: int, vocabulary: Vocabulary
) -> dict[str, Float[Tensor, "head column"]]:
    """What every head of a layer does with every pair.

    Returns:
        ``found [head pair]`` in the order of the sets' pairs (0 or 1); ``greater [head source]`` of
        the series that do not wrap around; ``wrong [head 2]``: of their pairs that are not found, how
        many there are and in how many the first candidate lies above the source.

    Raises:
        EngineError: The logits are not finite.
    """
    w_v, w_o = head_weights(model, layer)
    inside = _into_head(vocabulary.reps, w_v)
    outside = _out_of_head(w_o, vocabulary.unembed)
    found, greater, wrong = [], [], []
    for number, one in enumerate(vocabulary.sets):
        rows = vocabulary.rows(number)
        logits = inside[:, rows] @ outside[:, :, rows]
        if not logits.isfinite().all():
            raise EngineError(
                f"logits of the OV circuits of layer {layer} must be finite; some are not"
            )
        source, target = one.pairs().unbind(dim=1)
        among_targets = logits[:, source][:, :, target]
        hits = is_strict_maximum(among_targets, torch.arange(len(source)))
        found.append(hits.float())
        if not one.series.cyclic:
            greater.append(greater_than(logits))
            above = (target[among_targets.argmax(dim=-1)] > source) & ~hits
            wrong.append(torch.stack([(~hits).sum(dim=1), above.sum(dim=1)], dim=1).float())
    n_heads = len(w_v)
    none = torch.zeros(n_heads, 0)
    return {
        "found": torch.cat(found, dim=1),
        "greater": torch.cat([none, *greater], dim=1),
        "wrong": torch.stack([torch.zeros(n_heads, 2), *wrong]).sum(dim=0),
    }


def head_weights(
    model: ModelAdapter, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
    """W_V and W_O of every query head; grouped heads share their W_V."""
    w_v, w_o = model.weight("W_V", layer), model.weight("W_O", layer)
    return w_v.repeat_interleave(w_o.shape[0] // w_v.shape[0], dim=0), w_o


def task_of_pairs(sets: Sequence[TokenSet], tasks: Sequence[str]) -> Int[Tensor, " pair"]:
    """Index of the task of every pair, in the order of ``score_layer``."""
    return torch.tensor([tasks.index(one.series.name) for one in sets for _ in one.pairs()])


def chance(sets: Sequence[TokenSet]) -> float:
    """Share of pairs that guessing among the candidates of each form would find."""
    n_pairs = [len(one.pairs()) for one in sets]
    return len(n_pairs) / sum(n_pairs)
