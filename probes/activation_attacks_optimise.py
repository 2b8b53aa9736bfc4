"""Adam on the perturbations of many problems at once; each ends by itself and makes room.

Every problem has its own perturbation P, moments, step count and best iterate. The loss of a problem
is the mean cross-entropy of its target tokens, so the rows of a batch never touch each other. What
was reached is judged on the logits of the perturbation that is kept, never on those before a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.memory import is_out_of_memory

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""Adam's usual ones."""

NO_TARGET = -1
"""In ``targets``, past the end of a problem's own."""

LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""Perturbations ``[slot n_attacked d_model]`` and the problem of each slot ``[slot]`` -> logits at
the target positions ``[slot t d_vocab]``."""


@dataclass(frozen=True)
class Descent:
    """How a perturbation is searched; lr and steps as in the paper's code, as far as is known."""

    lr: float = 0.1
    steps: int = 300
    margin: float = 0.002
    """A target's logit must lie above all others by more than this."""
    norm: str = "l2"
    bound: float | None = None
    """Largest norm of the perturbation of one position; None: unbounded, as in the paper."""


@dataclass(frozen=True)
class Problems:
    """What is to be forced, and what may change for it."""

    targets: Int[Tensor, "problem t"]
    """Token ids, then ``NO_TARGET``."""
    free: Float[Tensor, "problem n_attacked d_model"]
    """1 where the perturbation may differ from 0."""


class Reached(NamedTuple):
    """The best iterate of one problem."""

    perturbation: Float[Tensor, "n_attacked d_model"]
    n_correct: int
    """Target tokens that were the argmax by more than the margin."""
    loss: float
    """Mean cross-entropy of the target tokens, nats."""
    n_steps: int


class Slots(NamedTuple):
    """The problems in work, one a row; every field's first axis is ``slot``."""

    problem: Tensor
    """Index of the problem."""
    perturbation: Tensor
    mean: Tensor
    square: Tensor
    n_steps: Tensor
    best: Tensor
    n_correct: Tensor
    loss: Tensor


def _ignore(*_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Listener:
    """Who is told what while problems are in work."""

    finished: Callable[[int, Reached], None]
    """A problem has ended."""
    passed: Callable[[float], None] = _ignore
    """After every pass, with the lowest loss of the problems in work."""
    standing: Callable[[Slots], None] = _ignore
    """Where the problems in work stand, before more than one problem's steps would be lost."""


class _Judged(NamedTuple):
    """What one pass says about each slot."""

    gradient: Tensor
    loss: Tensor
    n_correct: Tensor


def force_tokens(
    logits_of: LogitsOf,
    problems: Problems,
    descent: Descent,
    at_once: int,
    listener: Listener,
    *,
    begun: Slots | None = None,
) -> int:
    """Search perturbations for all problems, so many at once; tell about each when it ends.

    A problem ends when all its tokens are forced or its steps are used up; the next one takes its
    place. Out of memory, the passes are halved; no work is lost.

    Args:
        logits_of: Differentiable in the perturbations.
        problems: All of them.
        descent: The search.
        at_once: Problems of one pass; of more than ``steps``, a kill can lose more than one problem.
        listener: Told as soon as a problem ends, after every pass, and where the work stands.
        begun: Problems to go on with, from a ``standing`` of before.

    Returns:
        Problems of one pass at the end: less than ``at_once`` where memory did not suffice.
    """
    slots = _begin([], problems) if begun is None else begun
    in_work = set(slots.problem.tolist())
    waiting = [index for index in range(len(problems.targets)) if index not in in_work]
    n_target = (problems.targets != NO_TARGET).sum(dim=1)
    unsaved = 0
    while waiting or len(slots.problem):
        if unsaved + min(at_once, len(slots.problem) + len(waiting)) > descent.steps:
            listener.standing(slots)
            unsaved = 0
        room = max(0, at_once - len(slots.problem))
        slots = _join(slots, _begin(waiting[:room], problems))
        waiting = waiting[room:]
        judged, at_once = _judge_in_parts(logits_of, slots, problems, descent, at_once)
        slots = _keep_best(slots, judged)
        unsaved += len(slots.problem)
        listener.passed(float(slots.loss.min()))
        ended = (slots.n_steps >= descent.steps) | (judged.n_correct == n_target[slots.problem])
        for row in ended.nonzero()[:, 0].tolist():
            listener.finished(int(slots.problem[row]), _reached(slots, row))
        going = ~ended
        slots = _step(_rows(slots, going), judged.gradient[going], descent)
    return at_once


def score(
    logits: Float[Tensor, "slot t d_vocab"], targets: Int[Tensor, "slot t"], margin: float
) -> tuple[Float[Tensor, " slot"], Bool[Tensor, "slot t"]]:
    """Mean cross-entropy of each row's tokens, and which of them beat all others by ``margin``."""
    real = targets != NO_TARGET
    index = targets.clamp(min=0)[..., None]
    chosen = logits.gather(-1, index)[..., 0]
    surprise = (logits.logsumexp(dim=-1) - chosen).masked_fill(~real, 0.0)
    # A tie is no success: with equal logits, argmax would give token 0 away for nothing.
    rival = logits.detach().scatter(-1, index, -torch.inf).amax(dim=-1)
    return surprise.sum(dim=1) / real.sum(dim=1), real & (chosen - rival > margin)


def project(
    perturbation: Float[Tensor, "*batch d_model"], norm: str, bound: float | None
) -> Float[Tensor, "*batch d_model"]:
    """The nearest perturbation whose norm at each position is within the bound."""
    if bound is None:
        return perturbation
    if norm == "linf":
        return perturbation.clamp(-bound, bound)
    length = perturbation.norm(dim=-1, keepdim=True)
    return perturbation * (bound / length.clamp(min=bound))


def _begin(chosen: list[int], problems: Problems) -> Slots:
    free = problems.free
    problem = torch.tensor(chosen, dtype=torch.long, device=free.device)
    nothing = free.new_zeros(len(chosen), *free.shape[1:])
    count = torch.zeros_like(problem)
    loss = free.new_full((len(chosen),), torch.inf)
    return Slots(problem, nothing, nothing, nothing, count, nothing, count - 1, loss)


def _join(first: Slots, second: Slots) -> Slots:
    return Slots(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def _rows(slots: Slots, rows: Tensor) -> Slots:
    return Slots(*(field[rows] for field in slots))


def _judge_in_parts(
    logits_of: LogitsOf, slots: Slots, problems: Problems, descent: Descent, at_once: int
) -> tuple[_Judged, int]:
    while True:
        parts = torch.arange(len(slots.problem), device=slots.problem.device).split(at_once)
        try:
            judged = [_judge(logits_of, _rows(slots, part), problems, descent) for part in parts]
        except RuntimeError as error:
            if at_once == 1 or not is_out_of_memory(error):
                raise
            at_once //= 2
            continue
        return _Judged(*(torch.cat(field) for field in zip(*judged, strict=True))), at_once


def _judge(logits_of: LogitsOf, slots: Slots, problems: Problems, descent: Descent) -> _Judged:
    perturbation = slots.perturbation.detach().requires_grad_()
    free, targets = problems.free[slots.problem], problems.targets[slots.problem]
    logits = logits_of(perturbation * free, slots.problem)
    loss, correct = score(logits, targets, descent.margin)
    (gradient,) = torch.autograd.grad(loss.sum(), perturbation)
    return _Judged(gradient, loss.detach(), correct.sum(dim=1))


def _keep_best(slots: Slots, judged: _Judged) -> Slots:
    """More tokens forced is better; among equals the lower loss."""
    ahead = judged.n_correct > slots.n_correct
    better = ahead | ((judged.n_correct == slots.n_correct) & (judged.loss < slots.loss))
    return slots._replace(
        best=torch.where(better[:, None, None], slots.perturbation, slots.best),
        n_correct=torch.where(better, judged.n_correct, slots.n_correct),
        loss=torch.where(better, judged.loss, slots.loss),
    )


def _reached(slots: Slots, row: int) -> Reached:
    best = slots.best[row].clone()
    return Reached(best, int(slots.n_correct[row]), float(slots.loss[row]), int(slots.n_steps[row]))


def _step(slots: Slots, gradient: Tensor, descent: Descent) -> Slots:
    """One step of Adam; a row that came later has its own count of steps."""
    n_steps = slots.n_steps + 1
    mean = BETAS[0] * slots.mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * slots.square + (1 - BETAS[1]) * gradient**2
    count = n_steps[:, None, None].to(gradient.dtype)
    step = (mean / (1 - BETAS[0] ** count)) / ((square / (1 - BETAS[1] ** count)).sqrt() + EPSILON)
    moved = project(slots.perturbation - descent.lr * step, descent.norm, descent.bound)
    return slots._replace(perturbation=moved, mean=mean, square=square, n_steps=n_steps)
