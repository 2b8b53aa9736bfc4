"""Token-wise: which tokens of an item carry it, which are redundant, and what removing them costs.

With score(S) the cosine of what is read of an item under the keep-set S with the item's prototype (its
encoding alone), a token t of the item I is representative when

    score({t}) >= tau score(I),   score({t}) > 0   and   score({t}) > that of every other item

The other tokens of an item are redundant. An item is read correctly when its own prototype is the
nearest. Removing redundant tokens is judged by, with "before" and "after" the reading of each item,

    unaffected = P(correct after | correct before),  improved = P(correct after | wrong before)
    error reduction = 1 - error after / error before

Paper: Kaplan et al. 2025, arXiv:2504.01137, section 3. Card: information_flow section 2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.information_flow_encoding import Encoded, cosines
from probes.information_flow_items import NO_ITEM
from workbench.errors import DataError

KEEP_SETS = ("full", "tokens", "pads", "item", "removed")
"""Everything; the prompt's tokens without pads behind it; those pads alone; the item's tokens alone;
everything but the redundant tokens."""


def representative_tokens(
    score: Float[Tensor, " row"],
    whole: Float[Tensor, " row"],
    rival: Float[Tensor, " row"],
    tau: float,
) -> Bool[Tensor, " row"]:
    """Whether a token alone shows its item: nearly as well as the whole item, and no other better.

    Args:
        score: Of the keep-set of this token.
        whole: Of the keep-set of all the item's tokens.
        rival: The best score among the prompt's other items; -inf: there are none.
        tau: The share of ``whole`` that is enough.
    """
    return (score >= tau * whole) & (score > rival) & (score > 0)


def conditional(before: Bool[Tensor, " item"], after: Bool[Tensor, " item"]) -> dict[str, float]:
    """Accuracies before and after; those that have no case are left out."""
    found = {"accuracy_before": _share(before), "accuracy_after": _share(after)}
    if before.any():
        found["unaffected"] = _share(after[before])
    if not before.all():
        found["improved"] = _share(after[~before])
        found["error_reduction"] = relative_reduction(1 - _share(before), 1 - _share(after))
    return found


def relative_reduction(before: int | float, after: int | float) -> float:
    """1 - after / before: the share of errors (or leaks) that is gone.

    Raises:
        DataError: There was nothing to reduce.
    """
    if not before > 0:
        raise DataError(f"a relative reduction needs a rate above 0 before; got {before}")
    return 1.0 - after / before


def _share(where: Tensor) -> float:
    return where.double().mean().item()


def nearest_is_own(
    score: Float[Tensor, "row item proto"], exists: Bool[Tensor, "row item"]
) -> Bool[Tensor, "row item"]:
    """Whether every item's own prototype is the nearest; False for items that do not exist."""
    own = score.diagonal(dim1=-2, dim2=-1)
    others = score.masked_fill(~exists[:, None], -torch.inf)
    others = others.masked_fill(torch.eye(score.shape[-1], dtype=torch.bool), -torch.inf)
    return exists & (own > others.amax(dim=-1))


def item_tokens(
    of_pos: Int[Tensor, "prompt pos"],
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Prompt, position and item of every token that belongs to one."""
    prompt, pos = (of_pos != NO_ITEM).nonzero(as_tuple=True)
    return prompt, pos, of_pos[prompt, pos]


# Measurement


@dataclass(frozen=True)
class TokenScores:
    """What keep-sets show, for one batch."""

    keep_score: Float[Tensor, "prompt pos"]
    representative: Bool[Tensor, "prompt pos"]
    keep_set_score: Float[Tensor, "prompt item keep_set"]
    keep_set_correct: Bool[Tensor, "prompt item keep_set"]


def measure_tokens(
    encoded: Encoded,
    prototype: Float[Tensor, "prompt item d_model"],
    lengths: Int[Tensor, " prompt"],
    tau: float,
) -> TokenScores:
    """Score every token's keep-set, then those of items, tokens, pads and what is left.

    Args:
        encoded: The batch.
        prototype: What is read of every item alone.
        lengths: Tokens of the prompts without pads behind them.
        tau: See ``representative_tokens``.
    """
    places = encoded.places
    own, exists = places.mask(), places.mask().any(dim=-1)
    batch, n_items = exists.shape
    prompts, pos, item = item_tokens(places.of_pos)
    keep = torch.nn.functional.one_hot(pos, encoded.tokens.shape[1]).bool()
    rows = torch.arange(len(prompts))
    score = cosines(encoded.read(prompts, keep), prototype[prompts])[rows, item]
    whole = _item_scores(encoded, prototype, own, exists)
    single = score[rows, item]
    is_rival = exists[prompts] & (torch.arange(n_items) != item[:, None])
    rival = score.masked_fill(~is_rival, -torch.inf).amax(dim=-1)
    by_item = whole.diagonal(dim1=-2, dim2=-1)[prompts, item]
    found = representative_tokens(single, by_item, rival, tau)
    keep_score = torch.zeros(places.of_pos.shape)
    keep_score[prompts, pos] = single
    representative = torch.zeros(places.of_pos.shape, dtype=torch.bool)
    representative[prompts, pos] = found
    redundant = own.any(dim=1) & ~representative
    said = torch.arange(own.shape[-1]) < lengths[:, None]
    sets = {
        "full": torch.ones_like(said),
        "tokens": said,
        "pads": ~said & encoded.real,
        "removed": ~redundant,
    }
    scores = {"item": whole}
    everyone = torch.arange(batch)
    for name, kept in sets.items():
        scores[name] = cosines(encoded.read(everyone, kept), prototype)
    stacked = [scores[name] for name in KEEP_SETS]
    correct = torch.stack([nearest_is_own(each, exists) for each in stacked], dim=-1)
    own_score = torch.stack([each.diagonal(dim1=-2, dim2=-1) for each in stacked], dim=-1)
    return TokenScores(keep_score, representative, own_score * exists[..., None], correct)


def _item_scores(
    encoded: Encoded, prototype: Tensor, own: Tensor, exists: Tensor
) -> Float[Tensor, "prompt item proto"]:
    """Every item under the keep-set of its own tokens, against every prototype of its prompt."""
    prompts, item = exists.nonzero(as_tuple=True)
    read = encoded.read(prompts, own[prompts, item])
    score = cosines(read, prototype[prompts])
    out = torch.zeros(*exists.shape, exists.shape[1])
    out[prompts, item] = score[torch.arange(len(prompts)), item]
    return out


# Redundancy classifier


def predict_redundant(
    rep: Float[Tensor, "row d_model"],
    redundant: Bool[Tensor, " row"],
    prompt: Int[Tensor, " row"],
    n_folds: int,
) -> Bool[Tensor, " row"]:
    """Predict from a token's representation whether it is redundant, on prompts not trained on.

    One linear layer (logistic regression on standardised features), cross-validated by prompt.

    Raises:
        DataError: Fewer prompts than folds, or a fold that leaves one class to train on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n_prompts = len(prompt.unique())
    if n_prompts < n_folds:
        raise DataError(
            f"the redundancy classifier needs a prompt a fold with an item of several tokens: {n_folds} "
            f"prompts; got {n_prompts}; give at least {n_folds}, or lower classifier_folds"
        )
    x, y = rep.double().numpy(), redundant.numpy()
    out = torch.zeros(len(rep), dtype=torch.bool)
    for train, test in GroupKFold(n_folds).split(x, y, prompt.numpy()):
        if y[train].all() or not y[train].any():
            raise DataError(
                "the redundancy classifier needs redundant and representative tokens in every "
                f"training fold; got {int(y.sum())} redundant of {len(y)}; give more prompts, or set "
                "classifier_folds=0"
            )
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        fitted.fit(x[train], y[train])
        out[torch.as_tensor(test)] = torch.as_tensor(fitted.predict(x[test]))
    return out
