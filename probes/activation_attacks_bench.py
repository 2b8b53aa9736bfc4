"""A model under attack: problems become batches, and what a batch reached is checked afresh."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from probes.activation_attacks_cases import Cases
from probes.activation_attacks_optimise import (
    NO_TARGET,
    Descent,
    Listener,
    LogitsOf,
    Problems,
    Reached,
    Slots,
    force_tokens,
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


def _ignore(*_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Report:
    """Who is told what while problems are solved."""

    finished: Callable[[Problem, Outcome], None]
    """A problem has ended; at once."""
    passed: Callable[[float], None] = _ignore
    """After every pass, with the lowest loss in work."""
    note: Callable[[dict[str, Tensor]], None] = _ignore
    """Where the problems in work stand, before more than one problem's steps would be lost."""
    noted: dict[str, Tensor] | None = None
    """What ``note`` was told last in a run that was killed."""


def solve(
    bench: Bench,
    problems: Sequence[Problem],
    descent: Descent,
    report: Report,
) -> Bench:
    """Attack all problems, those of similar length together.

    Args:
        bench: The model under attack.
        problems: In any order.
        descent: The search.
        report: Told what happens; what it has ``noted`` of these problems is gone on with.

    Returns:
        The bench, with smaller passes where memory did not suffice.
    """
    for group in similar_lengths(problems):
        asked = _ask(bench, group)
        # One pass is then never more than one problem's steps; see ``Listener.standing``.
        at_once = min(problems_at_once(bench, group), descent.steps)
        listener = Listener(
            partial(_tell, bench, group, report.finished),
            report.passed,
            lambda slots, group=group: report.note(_described(slots, group)),
        )
        begun = _begun(report.noted, group, asked)
        left = force_tokens(
            _logits_of(bench, group), asked, descent, at_once, listener, begun=begun
        )
        if left < at_once:
            bench = replace(bench, at_most=left)
    return bench


def _described(slots: Slots, group: Sequence[Problem]) -> dict[str, Tensor]:
    """The problems in work as tensors, by their names."""
    names = json.dumps([group[index].name for index in slots.problem.tolist()])
    described = {**slots._asdict(), "names": torch.tensor(list(names.encode()), dtype=torch.uint8)}
    del described["problem"]
    return described


def _begun(
    noted: dict[str, Tensor] | None, group: Sequence[Problem], problems: Problems
) -> Slots | None:
    """Those of the problems that were noted in work, with what they had reached."""
    if noted is None:
        return None
    places = {problem.name: index for index, problem in enumerate(group)}
    names = json.loads(bytes(noted["names"].tolist()))
    rows = [row for row, name in enumerate(names) if name in places]
    if not rows:
        return None
    n_attacked, device = problems.free.shape[1], problems.free.device
    fields = {name: tensor[rows].to(device) for name, tensor in noted.items() if name != "names"}
    for name, tensor in fields.items():
        if tensor.dim() == 3:  # places beyond a problem's own hold zeros, more or fewer of them
            fields[name] = pad(tensor, (0, 0, 0, n_attacked - tensor.shape[1]))
    return Slots(torch.tensor([places[names[row]] for row in rows], device=device), **fields)


def _tell(
    bench: Bench,
    group: list[Problem],
    finished: Callable[[Problem, Outcome], None],
    index: int,
    reached: Reached,
) -> None:
    problem = group[index]
    own = reached.perturbation[: len(problem.cell.positions)]
    finished(problem, verify(bench, problem, reached._replace(perturbation=own)))


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


def _ask(bench: Bench, group: Sequence[Problem]) -> Problems:
    _, n_target, n_attacked = _extent(group)
    device = bench.resid.device
    targets = torch.full((len(group), n_target), NO_TARGET)
    free = torch.zeros(len(group), n_attacked, bench.resid.shape[-1], device=device)
    for index, problem in enumerate(group):
        targets[index, : problem.n_target] = bench.cases.targets[problem.row, : problem.n_target]
        free[index, : len(problem.cell.positions)] = bench.masks[problem.cell.share]
    return Problems(targets.to(device), free)


def _logits_of(bench: Bench, group: Sequence[Problem]) -> LogitsOf:
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
