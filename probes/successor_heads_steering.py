"""Two uses of the index inside a representation: changing the last digit, and factoring.

Steering. A token t with last digit r is given another digit r' by vector arithmetic,

    x' = x - k f_r + k f_r',    k = scale * |<x, f_r>| / |f_r|^2

and the head should now name the successor of the item of the same series that has digit r' (in the
same ten where the series has one, else in the nearest). The table has a row a source and a column
a digit.

Factoring. A linear map P takes the index from a token a and leaves the domain to a token b,

    z = P x_a + (I - P) x_b,

and z should be nearest to the token of b's domain with a's index. P is the ridge regression of
x_target - x_b on x_a - x_b, in the span of the tokens; targets are held out, cell by cell. The paper
trains its maps by gradient descent.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.successor_heads_features import N_RESIDUES, Span
from probes.successor_heads_scores import is_strict_maximum, ov_logits
from probes.successor_heads_tokens import TokenSet

SCALES = (0.5, 1.0, 2.0, 4.0)
HELD_OUT = 0.2
"""Share of (domain, index) cells that are no target while P is fitted."""
RIDGE = 1e-3
"""Of the mean eigenvalue."""

Head = tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]
"""W_V and W_O of one head."""


def head_logits(
    reps: Float[Tensor, "source d_model"], head: Head, unembed: Float[Tensor, "d_model token"]
) -> Float[Tensor, "source token"]:
    """L of one head."""
    w_v, w_o = head
    return ov_logits(reps, w_v[None], w_o[None], unembed)[0]


# Steering


def steer(
    reps: Float[Tensor, "source d_model"],
    directions: Float[Tensor, "residue d_model"],
    residue: Int[Tensor, " source"],
    scale: float,
) -> Float[Tensor, "source residue d_model"]:
    """Every source with its last digit's direction replaced by each of the ten."""
    own = directions[residue]
    strength = scale * (reps * own).sum(dim=1).abs() / own.square().sum(dim=1)
    return reps[:, None] + strength[:, None, None] * (directions[None] - own[:, None])


def steering_targets(tokens: TokenSet) -> Int[Tensor, "source residue"]:
    """Position among the targets of the pairs that each source and digit should lead to; -1: none."""
    sources = [tokens.index[row] for row in tokens.pairs()[:, 0].tolist()]

    def target(index: int, residue: int) -> int:
        ranked = [
            (abs(other // N_RESIDUES - index // N_RESIDUES), other, pair)
            for pair, other in enumerate(sources)
            if other % N_RESIDUES == residue
        ]
        return min(ranked)[2] if ranked else -1

    rows = [[target(index, residue) for residue in range(N_RESIDUES)] for index in tokens.index]
    return torch.tensor(rows).reshape(-1, N_RESIDUES)


@dataclass(frozen=True)
class Steered:
    """One series under one scale."""

    hit: Float[Tensor, "source residue"]
    """1: the head names the expected item; 0: another; NaN: the series has none with the digit."""
    said: Int[Tensor, "source residue"]
    """Index of the item that the head names."""

    def success(self, residue: Int[Tensor, " source"]) -> Float[Tensor, ""]:
        """Share of hits where the digit really changed; NaN where there is nothing to change."""
        own = torch.nn.functional.one_hot(residue, N_RESIDUES).bool()
        return self.hit.masked_fill(own, torch.nan).nanmean()


def steer_set(
    tokens: TokenSet,
    steered: Float[Tensor, "source residue d_model"],
    head: Head,
    unembed: Float[Tensor, "d_model token"],
) -> Steered:
    """What one head says of the steered sources of a series.

    Args:
        tokens: The series.
        steered: From ``steer``.
        head: W_V and W_O.
        unembed: Columns of the series' tokens.
    """
    targets = tokens.pairs()[:, 1]
    logits = head_logits(steered.flatten(0, 1), head, unembed)[:, targets]
    expected = steering_targets(tokens)
    hit = is_strict_maximum(logits, expected.flatten().clamp(min=0)).float().view_as(expected)
    index = torch.tensor(tokens.index)[targets]
    said = index[logits.argmax(dim=1)].view_as(expected)
    return Steered(hit.masked_fill(expected < 0, torch.nan), said)


def digit_logits(
    directions: Float[Tensor, "residue d_model"],
    head: Head,
    unembed: Float[Tensor, "d_model token"],
    index: Int[Tensor, " token"],
) -> Float[Tensor, "residue named"]:
    """What the head makes of each digit's direction: mean logit by last digit of the named number.

    Rows have mean 0 and standard deviation 1.
    """
    logits = head_logits(directions, head, unembed)
    member = torch.nn.functional.one_hot(index % N_RESIDUES, N_RESIDUES).float()
    mean = logits @ member / member.sum(dim=0)
    spread = mean.std(dim=1, correction=0, keepdim=True).clamp(min=1e-30)
    return (mean - mean.mean(dim=1, keepdim=True)) / spread


def names_next_digit(logits: Float[Tensor, "residue named"]) -> Bool[Tensor, " residue"]:
    """Whether each digit's direction raises the numbers with the next digit the most."""
    return logits.argmax(dim=1) == (torch.arange(N_RESIDUES) + 1) % N_RESIDUES


# Index and domain


@dataclass(frozen=True)
class Cells:
    """Tokens with a domain and an index."""

    reps: Float[Tensor, "cell rank"]
    domain: Int[Tensor, " cell"]
    index: Int[Tensor, " cell"]


def make_cells(reps: Sequence[Tensor], sets: Sequence[TokenSet]) -> Cells:
    """One domain a set; only indices that two domains have."""
    index = torch.cat([torch.tensor(one.index) for one in sets])
    domain = torch.cat([torch.full((len(one.index),), d) for d, one in enumerate(sets)])
    shared = torch.tensor([len(domain[index == i].unique()) > 1 for i in index.tolist()])
    return Cells(torch.cat(list(reps))[shared], domain[shared], index[shared])


def combinations(
    source: Cells, cells: Cells
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """(a, b, target): a gives the index, b of another domain the domain; b is not the target."""
    where = {
        key: cell
        for cell, key in enumerate(zip(cells.domain.tolist(), cells.index.tolist(), strict=True))
    }
    rows = [
        (a, b, where[d, i])
        for a, (own, i) in enumerate(
            zip(source.domain.tolist(), source.index.tolist(), strict=True)
        )
        for b, (d, j) in enumerate(zip(cells.domain.tolist(), cells.index.tolist(), strict=True))
        if d != own and j != i and (d, i) in where
    ]
    a, b, target = torch.tensor(rows, dtype=torch.long).reshape(-1, 3).unbind(dim=1)
    return a, b, target


def fit_index_map(
    difference: Float[Tensor, "pair rank"], wanted: Float[Tensor, "pair rank"]
) -> Float[Tensor, "rank rank"]:
    """P, applied from the right to rows: ridge regression of ``wanted`` on ``difference``."""
    gram = difference.T @ difference
    ridge = RIDGE * gram.diagonal().mean()
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), difference.T @ wanted)


def nearest(
    z: Float[Tensor, "pair rank"], reps: Float[Tensor, "cell rank"]
) -> Int[Tensor, " pair"]:
    """The cell whose representation is nearest."""
    return torch.cdist(z, reps).argmin(dim=1)


def factoring_accuracy(
    reps: Sequence[Float[Tensor, "_ d_model"]],
    sets: Sequence[TokenSet],
    generator: torch.Generator,
    unseen: tuple[Float[Tensor, "_ d_model"], TokenSet] | None = None,
) -> tuple[float | None, float | None]:
    """Share of held-out combinations that decode to the right token; the same for an unseen domain.

    Args:
        reps: Of every set.
        sets: One a domain.
        generator: Draws the held-out cells.
        unseen: A domain that P never sees, which gives indices only (Roman numerals).

    Returns:
        None for what cannot be tried: fewer than two domains, or no unseen domain.
    """
    if len(sets) < 2:
        return None, None
    span = Span.of(torch.cat(list(reps)))
    cells = make_cells([span.coordinates(one) for one in reps], sets)
    a, b, target = combinations(cells, cells)
    order = torch.randperm(len(cells.index), generator=generator)
    held = torch.zeros(len(order), dtype=torch.bool)
    held[order[: int(HELD_OUT * len(order))]] = True
    test = held[target]
    if not test.any() or test.all():
        return None, None
    x = cells.reps
    index_map = fit_index_map((x[a] - x[b])[~test], (x[target] - x[b])[~test])

    def accuracy(source: Tensor, base: Tensor, wanted: Tensor) -> float:
        z = base + (source - base) @ index_map
        return (nearest(z, x) == wanted).float().mean().item()

    known = accuracy(x[a][test], x[b][test], target[test])
    if unseen is None:
        return known, None
    strange = span.coordinates(unseen[0])
    outside = Cells(strange, torch.full((len(strange),), -1), torch.tensor(unseen[1].index))
    a, b, target = combinations(outside, cells)
    return known, accuracy(strange[a], x[b], target) if len(a) else None
