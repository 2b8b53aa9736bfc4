"""The last digit, put together: features, probe, steering and factoring on one model's tokens.

Paper: Gould et al. 2023, "Successor Heads", arXiv:2312.09230, section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.successor_heads_features import (
    N_RESIDUES,
    LinearProbe,
    SaeSettings,
    Span,
    fit_probe,
    held_out_accuracy,
    mean_cosine,
    modal,
    residue_features,
    residue_problem,
    train_sae,
)
from probes.successor_heads_scores import TokenPath, Vocabulary
from probes.successor_heads_steering import (
    SCALES,
    Head,
    digit_logits,
    factoring_accuracy,
    names_next_digit,
    steer,
    steer_set,
)
from probes.successor_heads_tokens import ROMAN, TokenSet, TokenSets, token_set
from workbench.context import Context
from workbench.models.base import ModelAdapter


@dataclass(frozen=True)
class SteeringTables:
    """Of the fullest form of every task."""

    table: Float[Tensor, "source residue"]
    index: Int[Tensor, "source residue"]
    by_scale: Float[Tensor, "scale task"]
    success: Float[Tensor, " task"]
    sources: tuple[str, ...]
    """"task:item" of every row of the table."""


@dataclass(frozen=True)
class Digits:
    """What was found; a number that could not be measured is not among ``numbers``."""

    features: Float[Tensor, "residue d_model"]
    probe_accuracy: Float[Tensor, " task"]
    feature_logits: Float[Tensor, "residue named"]
    steering: SteeringTables
    numbers: dict[str, float] = field(default_factory=dict)

    def arrays(self) -> dict[str, Tensor]:
        """Under the names of the result."""
        return {
            "mod10_features": self.features,
            "feature_logits": self.feature_logits,
            "probe_accuracy_by_task": self.probe_accuracy,
            "steering_success": self.steering.success,
            "steering_table": self.steering.table,
            "steered_index": self.steering.index,
            "steering_by_scale": self.steering.by_scale,
        }


def digit_problem(sets: TokenSets) -> str | None:
    """Why the last digit cannot be studied with this tokenizer; None: it can."""
    return residue_problem([i for one in sets.of("numbers") for i in one.index])


def study_digits(
    sets: TokenSets,
    vocabulary: Vocabulary,
    head: Head,
    sae: tuple[SaeSettings, int, float],
    context: Context,
) -> Digits:
    """Fit features and probe on the numbers, try them on every task, steer the head.

    Args:
        sets: Of which ``digit_problem`` is None.
        vocabulary: Their representations.
        head: The head that is steered.
        sae: Settings of an autoencoder, the number of seeds, and the scale of steering.
        context: Seeds, progress, finished parts.
    """
    settings, n_seeds, scale = sae
    own = sets.of("numbers")
    reps = torch.cat([vocabulary.reps[vocabulary.rows_of(one)] for one in own])
    index = torch.tensor([i for one in own for i in one.index])
    span = Span.of(reps)
    x, residue = span.coordinates(reps), index % N_RESIDUES
    rows, numbers = _features(x, residue, settings, n_seeds, context)
    directions = span.directions(rows)
    probe = fit_probe(x, residue)
    numbers["feature_probe_cosine"] = mean_cosine(directions, span.directions(probe.weight))
    by_task, transfer = _transfer(probe, span, sets, vocabulary)
    numbers |= transfer
    numbers["probe_accuracy_fitted"] = probe.accuracy(x, residue)
    held_out = held_out_accuracy(x, index)
    if held_out is not None:
        numbers["probe_accuracy_held_out_tens"] = held_out
    by_task[sets.tasks.index("numbers")] = torch.nan if held_out is None else held_out
    unembed = torch.cat([vocabulary.unembed[:, vocabulary.rows_of(one)] for one in own], dim=1)
    logits = digit_logits(directions, head, unembed, index)
    numbers["feature_names_next"] = names_next_digit(logits).float().mean().item()
    steering = _steering(sets, vocabulary, head, directions, scale)
    twenties = steering_in_twenties(steering.table, steering.sources)
    numbers |= {} if math.isnan(twenties) else {"steering_20_29": twenties}
    return Digits(directions, torch.tensor(by_task), logits, steering, numbers)


def _transfer(
    probe: LinearProbe, span: Span, sets: TokenSets, vocabulary: Vocabulary
) -> tuple[list[float], dict[str, float]]:
    """Accuracy on every task, and on all tokens of the tasks other than numbers."""
    chosen = [sets.fullest(task) for task in sets.tasks]

    def accuracy(one: TokenSet) -> float:
        x = span.coordinates(vocabulary.reps[vocabulary.rows_of(one)])
        return probe.accuracy(x, torch.tensor(one.index) % N_RESIDUES)

    by_task = [accuracy(one) for one in chosen]
    others = [
        (share, len(one.ids))
        for share, one in zip(by_task, chosen, strict=True)
        if one.series.name != "numbers"
    ]
    n_tokens = sum(n for _, n in others)
    if not n_tokens:
        return by_task, {}
    right = sum(share * n for share, n in others)
    return by_task, {"probe_accuracy": right / n_tokens, "probe_tokens": float(n_tokens)}


def _features(
    x: Tensor, residue: Tensor, settings: SaeSettings, n_seeds: int, context: Context
) -> tuple[Float[Tensor, "residue rank"], dict[str, float]]:
    def one(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * context.seed + seed)
        found = residue_features(train_sae(x, settings, generator), residue)
        return {"rows": found.rows, "covered": torch.tensor([found.covered])}

    parts = []
    for seed in range(n_seeds):
        parts.append(context.piece(f"autoencoder-{seed}", lambda s=seed: one(s)))
        context.progress(seed + 1, n_seeds)
    rows, agreement = modal(torch.stack([part["rows"] for part in parts]))
    covered = torch.cat([part["covered"] for part in parts]).mean().item()
    numbers = {"feature_coverage": covered}
    return rows, numbers | ({"feature_agreement": agreement} if n_seeds > 1 else {})


def _steering(
    sets: TokenSets, vocabulary: Vocabulary, head: Head, directions: Tensor, scale: float
) -> SteeringTables:
    chosen = [sets.fullest(task) for task in sets.tasks]

    def at(scale: float, one: TokenSet):  # type: ignore[no-untyped-def]
        rows = vocabulary.rows_of(one)
        residue = torch.tensor(one.index) % N_RESIDUES
        steered = steer(vocabulary.reps[rows], directions, residue, scale)
        found = steer_set(one, steered, head, vocabulary.unembed[:, rows])
        return found, found.success(residue)

    main = [at(scale, one) for one in chosen]
    return SteeringTables(
        table=torch.cat([found.hit for found, _ in main]),
        index=torch.cat([found.said for found, _ in main]),
        by_scale=torch.stack([torch.stack([at(k, one)[1] for one in chosen]) for k in SCALES]),
        success=torch.stack([share for _, share in main]),
        sources=tuple(f"{one.series.name}:{word}" for one in chosen for word in one.words()),
    )


def study_factoring(
    model: ModelAdapter, sets: TokenSets, vocabulary: Vocabulary, path: TokenPath, context: Context
) -> dict[str, float]:
    """Accuracy of the index/domain map on held-out tokens, and from Roman numerals."""
    chosen = [sets.fullest(task) for task in sets.tasks]
    reps = [vocabulary.reps[vocabulary.rows_of(one)] for one in chosen]
    roman = max(
        (token_set(model.tokenizer, ROMAN, form) for form in ("space", "bare")),
        key=lambda one: len(one.ids),
    )
    unseen = (path.represent(model, torch.tensor(roman.ids)), roman) if roman.ids else None
    known, strange = factoring_accuracy(reps, chosen, context.generator(), unseen)
    found = {"factoring_accuracy": known, "factoring_accuracy_roman": strange}
    return {name: value for name, value in found.items() if value is not None}


def steering_in_twenties(table: Float[Tensor, "source residue"], sources: Sequence[str]) -> float:
    """Success on the numbers 20 to 29, the paper's figure; NaN where one of them is missing."""
    rows = [
        (row, int(source.split(":")[1]) % N_RESIDUES)
        for row, source in enumerate(sources)
        if source.startswith("numbers:") and 20 <= int(source.split(":")[1]) <= 29
    ]
    if len(rows) < N_RESIDUES:
        return torch.nan
    hits = [table[row, r] for row, own in rows for r in range(N_RESIDUES) if r != own]
    return torch.stack(hits).nanmean().item()
