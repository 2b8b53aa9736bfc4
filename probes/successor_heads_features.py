"""Directions for the last digit: a sparse autoencoder, and a linear probe beside it.

Both are fitted on what the first MLP makes of the numbers' tokens. The autoencoder

    f = ReLU((x - b_d) W_e + b_e),    x' = f W_d + b_d,    loss = mean |x - x'|^2 + penalty |f|_1

has decoder rows of norm 1. Here x is centred and scaled to a mean |x|^2 of 1, which gives the
penalty a meaning on every model, and lies in the span of the tokens, which is small. The feature of a
residue is the one whose mean activation there exceeds its mean elsewhere the most; of several seeds
the modal one is kept, which agrees best with those of the others.

The probe is a multinomial logistic regression on the residue, tried on the other tasks, which it
has not seen.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_RESIDUES = 10
MIN_PER_RESIDUE = 2
"""Numbers with each last digit, or there is nothing to tell the digit from the number."""
LEARNING_RATE = 0.03
"""Held for half of the steps, then brought to 0 on a line."""
FOLDS = 5
INVERSE_PENALTY = 10.0
"""scikit-learn's C of the probe, on vectors of mean square 1."""


@dataclass(frozen=True)
class Span:
    """The space in which some vectors lie: ``x = mean + scale * coordinates @ basis``."""

    mean: Float[Tensor, " d_model"]
    basis: Float[Tensor, "rank d_model"]
    scale: float

    @staticmethod
    def of(x: Float[Tensor, "token d_model"]) -> "Span":
        """Centre, and keep every direction in which the vectors differ."""
        mean = x.mean(dim=0)
        _, size, basis = torch.linalg.svd(x - mean, full_matrices=False)
        kept = size > 1e-5 * size[0].clamp(min=1e-30)
        scale = (x - mean).square().sum(dim=1).mean().sqrt()
        return Span(mean, basis[kept], float(scale.clamp(min=1e-30)))

    def coordinates(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token rank"]:
        """Of any vectors; what lies outside of the space is dropped."""
        return (x - self.mean) @ self.basis.T / self.scale

    def directions(self, coordinates: Float[Tensor, "row rank"]) -> Float[Tensor, "row d_model"]:
        """Unit vectors of the whole space."""
        return torch.nn.functional.normalize(coordinates @ self.basis, dim=1)


def residue_problem(index: Sequence[int]) -> str | None:
    """Why last digits cannot be studied on these numbers; None: they can."""
    counts = [len({i for i in index if i % N_RESIDUES == r}) for r in range(N_RESIDUES)]
    if min(counts) >= MIN_PER_RESIDUE:
        return None
    digit = counts.index(min(counts))
    return (
        f"the last digit needs {MIN_PER_RESIDUE} numbers with each digit as single tokens; there are "
        f"{counts[digit]} with {digit} and {len(set(index))} numbers in all"
    )


# Sparse autoencoder


@dataclass(frozen=True)
class SaeSettings:
    """Of one autoencoder."""

    n_features: int
    penalty: float
    steps: int


@dataclass(frozen=True)
class Sae:
    """What training left."""

    decoder: Float[Tensor, "feature rank"]
    active: Float[Tensor, "token feature"]


def train_sae(
    x: Float[Tensor, "token rank"], settings: SaeSettings, generator: torch.Generator
) -> Sae:
    """Fit one autoencoder with Adam, all tokens in every step.

    Args:
        x: Mean 0, mean square norm 1.
        settings: Sizes.
        generator: Draws the decoder; the encoder begins as its transpose.
    """
    draw = torch.randn(settings.n_features, x.shape[1], generator=generator)
    decoder = torch.nn.functional.normalize(draw, dim=1)
    parts = [decoder, decoder.T.clone(), torch.zeros(settings.n_features), torch.zeros(x.shape[1])]
    with torch.enable_grad():
        w_d, w_e, b_e, b_d = parts = [part.requires_grad_() for part in parts]
        optimizer = torch.optim.Adam(parts, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, 2 * (1 - step / settings.steps))
        )
        for _ in range(settings.steps):
            active = torch.relu((x - b_d) @ w_e + b_e)
            error = (x - active @ w_d - b_d).square().sum(dim=1)
            loss = (error + settings.penalty * active.sum(dim=1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                w_d.copy_(torch.nn.functional.normalize(w_d, dim=1))
    with torch.no_grad():
        active = torch.relu((x - b_d) @ w_e + b_e)
    return Sae(w_d.detach(), active)


def selectivity(
    active: Float[Tensor, "token feature"], residue: Int[Tensor, " token"]
) -> Float[Tensor, "residue feature"]:
    """Mean activation of each feature on a residue's tokens minus that on all others."""
    member = torch.nn.functional.one_hot(residue, N_RESIDUES).T.float()
    inside = member @ active / member.sum(dim=1, keepdim=True)
    outside = (1 - member) @ active / (1 - member).sum(dim=1, keepdim=True)
    return inside - outside


def coverage(active: Float[Tensor, "token feature"], residue: Int[Tensor, " token"]) -> float:
    """Mean over residues of the share of tokens whose most active feature is the residue's modal one.

    A token on which no feature is active counts as not covered.
    """
    top = active.argmax(dim=1).masked_fill(active.amax(dim=1) <= 0, -1)
    shares = []
    for r in range(N_RESIDUES):
        own = top[residue == r]
        counts = torch.bincount(own[own >= 0], minlength=1)
        shares.append(float(counts.max()) / len(own))
    return sum(shares) / N_RESIDUES


@dataclass(frozen=True)
class ResidueFeatures:
    """Of one autoencoder: the feature of every residue."""

    rows: Float[Tensor, "residue rank"]
    covered: float


def residue_features(sae: Sae, residue: Int[Tensor, " token"]) -> ResidueFeatures:
    """The decoder row of each residue's most selective feature."""
    chosen = selectivity(sae.active, residue).argmax(dim=1)
    return ResidueFeatures(sae.decoder[chosen], coverage(sae.active, residue))


def modal(
    rows: Float[Tensor, "seed residue rank"],
) -> tuple[Float[Tensor, "residue rank"], float]:
    """Per residue the seed's feature that agrees best with the others', and the mean agreement.

    Agreement is the mean cosine between features of different seeds, 1 for a single seed.
    """
    unit = torch.nn.functional.normalize(rows, dim=-1)
    cosines = torch.einsum("ard,brd->rab", unit, unit)
    n_seeds = len(rows)
    best = cosines.sum(dim=2).argmax(dim=1)
    if n_seeds == 1:
        return rows[0], 1.0
    between = (cosines.sum(dim=(1, 2)) - n_seeds) / (n_seeds * (n_seeds - 1))
    return rows[best, torch.arange(len(best))], between.mean().item()


# Linear probe


@dataclass(frozen=True)
class LinearProbe:
    """A multinomial logistic regression on the last digit."""

    weight: Float[Tensor, "residue rank"]
    bias: Float[Tensor, " residue"]

    def accuracy(self, x: Float[Tensor, "token rank"], residue: Int[Tensor, " token"]) -> float:
        """Share of tokens whose residue is found."""
        found = (x @ self.weight.T + self.bias).argmax(dim=1)
        return (found == residue).float().mean().item()


def fit_probe(x: Float[Tensor, "token rank"], residue: Int[Tensor, " token"]) -> LinearProbe:
    """Fit the probe; every residue must occur."""
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression(C=INVERSE_PENALTY, max_iter=10_000).fit(
        x.double().numpy(), residue.numpy()
    )
    return LinearProbe(
        torch.tensor(fit.coef_, dtype=torch.float32),
        torch.tensor(fit.intercept_, dtype=torch.float32),
    )


def held_out_accuracy(x: Float[Tensor, "token rank"], index: Int[Tensor, " token"]) -> float | None:
    """Accuracy on tens that the probe has not seen, five folds; None: too few numbers for it.

    Forms of one number stay in one fold.
    """
    fold = index.div(N_RESIDUES, rounding_mode="floor") % FOLDS
    residue = index % N_RESIDUES
    right = 0.0
    for number in fold.unique():
        test = fold == number
        if len(residue[~test].unique()) < N_RESIDUES:
            return None
        probe = fit_probe(x[~test], residue[~test])
        right += probe.accuracy(x[test], residue[test]) * int(test.sum())
    return right / len(x)


def mean_cosine(a: Float[Tensor, "row d"], b: Float[Tensor, "row d"]) -> float:
    """Mean over rows of the cosine between two sets of vectors."""
    return torch.nn.functional.cosine_similarity(a, b, dim=1).mean().item()
