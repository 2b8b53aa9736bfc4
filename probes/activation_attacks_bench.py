"""A model under attack: problems become batches, and what a batch reached is checked afresh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_cases import Cases
from probes.activation_attacks_optimise import (
    NO_TARGET,
    LogitsOf,
    Problems,
    Reached,
    score,
)
from workbench.models.base import ModelAdapter, Site
from workbench.models.inputs import device_of
from workbench.models.memory import gradient_bytes, prefix_bytes, tell_over_budget
from workbench.models.prefix import Prefix, continue_after, prefix_of

N_STATES = 8
"""Tensors as large as the perturbation that a problem in work needs: moments, best, gradient, steps."""


@dataclass(frozen=True)
class Cell:
    """What the attacker controls."""

    positions: tuple[int, ...]
    share: float = 1.0
    """Of the dimensions."""


class Problem(NamedTuple):
    """Force the first ``n_target`` target tokens of one pair of context and target."""

    cell: Cell
    n_target: int
    row: int

    @property
    def name(self) -> str:
        """Unique within a run."""
        places = "-".join(map(str, self.cell.positions))
        return f"at-{places}-share-{self.cell.share:g}-t-{self.n_target}-row-{self.row}"


class Outcome(NamedTuple):
    """What a fresh forward pass, without a prefix and alone, says about a perturbation."""

    perturbation: Float[Tensor, "n_attacked d_model"]
    n_correct: int
    """Target tokens whose logit is above all others by more than the margin."""
    is_argmax: bool
    """Every target token is the argmax, by whatever margin."""
    loss: float
    n_steps: int
    norm_ratio: float
    """Norm of the perturbation over that of the residual stream it is added to."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, what is attacked, and the residual stream that perturbations are added to."""

    model: ModelAdapter
    layer: int
    cases: Cases
    resid: Float[Tensor, "row pos d_model"]
    """``resid_pre`` of the layer for context and target, on the model's device, float32."""
    masks: dict[float, Tensor]
    """By share: 1 at the dimensions that may be perturbed."""
    margin: float = 0.001
    budget_bytes: int = 1 << 30
    at_most: int | None = None
    """Problems of one pass, whatever the budget allows."""

    @property
    def n_context(self) -> int:
        """Tokens of a context."""
        return self.cases.contexts.shape[1]


def make_bench(model: ModelAdapter, layer: int, cases: Cases, masks: dict[float, Tensor]) -> Bench:
    """Run contexts and targets up to the attacked layer, once."""
    site = Site("resid_pre", layer)
    # The last target token is never read; a target may end where n_ctx does.
    tokens = torch.cat([cases.contexts, cases.targets[:, :-1]], dim=1)
    rows = [model.capture(row[None], [site])[site] for row in tokens]
    device = device_of(model)
    masks = {share: mask.to(device) for share, mask in masks.items()}
    return Bench(model, layer, cases, torch.cat(rows).to(device), masks)


def perturbed(
    resid: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch n_attacked"],
    perturbation: Float[Tensor, "batch n_attacked d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Add a perturbation at some positions; the others keep every bit."""
    index = positions[..., None].expand(-1, -1, resid.shape[-1])
    return resid.scatter_add(1, index, perturbation)


def verify(bench: Bench, problem: Problem, reached: Reached) -> Outcome:
    """Judge a perturbation on a whole forward pass of its own."""
    resid = bench.resid[problem.row, None, : bench.n_context + problem.n_target - 1]
    positions = torch.tensor([problem.cell.positions], device=resid.device)
    perturbation = reached.perturbation
    with torch.no_grad():
        attacked = perturbed(resid, positions, perturbation[None])
        logits = bench.model.continue_from(bench.layer, attacked, last=problem.n_target)
    targets = bench.cases.targets[problem.row, None, : problem.n_target].to(logits.device)
    loss, correct = score(logits, targets, bench.margin)
    _, argmax = score(logits, targets, 0.0)
    return Outcome(
        perturbation.cpu(),
        int(correct.sum()),
        bool(argmax.all()),
        float(loss),
        reached.n_steps,
        float(perturbation.norm() / resid[0, positions[0]].norm()),
    )


def similar_lengths(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems whose targets are within a factor of two of each other, the longest first."""
    groups: dict[int, list[Problem]] = {}
    for problem in sorted(problems, key=lambda each: -each.n_target):
        groups.setdefault(math.ceil(math.log2(problem.n_target)), []).append(problem)
    return list(groups.values())


def problems_at_once(bench: Bench, group: Sequence[Problem]) -> int:
    """How many problems one pass may hold within the memory budget.

    Counted are the pass forward and backward, the state of Adam, and the keys and values of what
    stands before the first attacked position; not the model, and not what every run keeps anyway
    (contexts, their residual stream, what was found).
    """
    spec = bench.model.spec
    first, n_target, n_attacked = _extent(group)
    one = gradient_bytes(spec, bench.n_context - first + n_target - 1, n_target, first)
    one += N_STATES * 4 * n_attacked * spec.d_model
    left = bench.budget_bytes - len(bench.cases.contexts) * prefix_bytes(spec, first)
    tell_over_budget(one, left, f"an attack on {n_target} tokens")
    return max(1, min(left // one, bench.at_most or len(group)))


def _extent(group: Sequence[Problem]) -> tuple[int, int, int]:
    """First attacked position, longest target, most attacked positions."""
    return (
        min(problem.cell.positions[0] for problem in group),
        max(problem.n_target for problem in group),
        max(len(problem.cell.positions) for problem in group),
    )


def ask(bench: Bench, group: Sequence[Problem]) -> Problems:
    """Targets and free dimensions of a group, side by side."""
    _, n_target, n_attacked = _extent(group)
    device = bench.resid.device
    targets = torch.full((len(group), n_target), NO_TARGET)
    free = torch.zeros(len(group), n_attacked, bench.resid.shape[-1], device=device)
    for index, problem in enumerate(group):
        targets[index, : problem.n_target] = bench.cases.targets[problem.row, : problem.n_target]
        free[index, : len(problem.cell.positions)] = bench.masks[problem.cell.share]
    return Problems(targets.to(device), free)


def logits_of_group(bench: Bench, group: Sequence[Problem]) -> LogitsOf:
    """The model from the first attacked position on; what lies before it is run once."""
    first, n_target, n_attacked = _extent(group)
    device = bench.resid.device
    rows = torch.tensor([problem.row for problem in group], device=device)
    # Where a problem has fewer positions, zeros are added at the first one.
    positions = torch.zeros(len(group), n_attacked, dtype=torch.long)
    for index, problem in enumerate(group):
        places = torch.tensor(problem.cell.positions) - first
        positions[index, : len(places)] = places
    positions = positions.to(device)
    whole = prefix_of(bench.model, bench.cases.contexts[:, :first])
    start = first if whole is not None else 0
    resid = bench.resid[:, start : bench.n_context + n_target - 1]
    positions = positions + (first - start)
    select = _Selection(whole)

    def logits_of(perturbation: Tensor, problem: Tensor) -> Tensor:
        chosen = rows[problem]
        attacked = perturbed(resid[chosen], positions[problem], perturbation)
        prefix = select(chosen)
        # The logits at the last context token and at all target tokens but the last.
        return continue_after(bench.model, bench.layer, attacked, prefix, n_target)

    return logits_of


class _Selection:
    """The prefixes of some rows, kept until other rows are asked for."""

    def __init__(self, whole: Prefix | None) -> None:
        self._whole = whole
        self._rows: list[int] = []
        self._selected: Prefix | None = None

    def __call__(self, rows: Tensor) -> Prefix | None:
        asked = rows.tolist()
        if self._whole is not None and asked != self._rows:
            self._rows, self._selected = asked, self._whole.select(rows)
        return self._selected
