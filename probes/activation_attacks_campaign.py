"""Tries attackers and lengths, keeps every problem that ends at once, and says where it stands."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from probes.activation_attacks_bench import Bench, Cell, Outcome, Problem
from probes.activation_attacks_config import ActivationAttackConfig
from probes.activation_attacks_replay import agrees_with_generation
from probes.activation_attacks_solve import Report, solve
from probes.activation_attacks_tokens import substitute
from workbench.context import Context

SHOW_EVERY = 0.5
"""Seconds between two lines while nothing ends."""
IN_WORK = "in work"
"""Name of the note about problems that have not ended."""


@dataclass
class Campaign:
    """All problems of a run, and what became of them."""

    bench: Bench
    config: ActivationAttackConfig
    context: Context
    outcomes: dict[Problem, Outcome] = field(default_factory=dict)
    agrees: dict[Problem, bool] = field(default_factory=dict)
    """Whether greedy generation confirms the outcome."""
    standing: "Standing" = field(init=False)

    def __post_init__(self) -> None:
        self.standing = Standing(self.context.status, self.config.n_seeds)

    def perturb(self, asked: list[tuple[Cell, int]]) -> dict[tuple[Cell, int], Tensor]:
        """Attack with activations; see ``activation_attacks_search.Evaluate``."""
        rows = range(self.config.n_seeds)
        problems = [Problem(cell, t, row) for cell, t in asked for row in rows]
        todo = [problem for problem in problems if not self._find(problem)]
        report = Report(
            self._finished,
            self.standing.passed,
            partial(self.context.note, IN_WORK),
            self.context.noted(IN_WORK) if todo else None,
        )
        self.bench = solve(self.bench, todo, self.config.descent, report)
        if self.config.check_generation:
            self._check(problems)
        return {
            (cell, t): torch.tensor(
                [self.outcomes[Problem(cell, t, row)].n_correct / t for row in rows]
            )
            for cell, t in asked
        }

    def replace_tokens(self, asked: list[tuple[Cell, int]]) -> dict[tuple[Cell, int], Tensor]:
        """Attack with tokens; see ``activation_attacks_search.Evaluate``."""

        def share(cell: Cell, t: int, row: int) -> float:
            part = self.context.piece(
                f"tokens-{Problem(cell, t, row).name}", lambda: self._substituted(cell, t, row)
            )
            solved = int(part["n_correct"]) == t
            self.standing.ended(float(part["loss"]), solved=solved)
            return int(part["n_correct"]) / t

        rows = range(self.config.n_seeds)
        return {(cell, t): torch.tensor([share(cell, t, row) for row in rows]) for cell, t in asked}

    def report(self, what: str) -> Callable[[int, int], None]:
        """Tells how many tries of a search are done, of how many."""

        def tell(done: int, expected: int) -> None:
            self.standing.begin(what, done, expected)
            self.context.progress(done, expected)

        return tell

    def _substituted(self, cell: Cell, t: int, row: int) -> dict[str, Tensor]:
        found = substitute(self.bench, row, cell.positions, t, self.config.shortlist)
        return {
            "n_correct": torch.tensor(found.n_correct),
            "loss": torch.tensor(found.loss),
            "tokens": found.tokens,
        }

    def _find(self, problem: Problem) -> bool:
        """Whether an outcome is known: of this run, or kept by one that was killed."""
        outcome = self.outcomes.get(problem)
        if outcome is None:
            part = self.context.kept(problem.name)
            if part is None:
                return False
            outcome = _outcome(part)
        self._add(problem, outcome)
        return True

    def _finished(self, problem: Problem, outcome: Outcome) -> None:
        self.context.piece(problem.name, lambda: _part(outcome))
        self._add(problem, outcome)

    def _add(self, problem: Problem, outcome: Outcome) -> None:
        self.outcomes[problem] = outcome
        self.standing.ended(outcome.loss, solved=outcome.n_correct == problem.n_target)

    def _check(self, problems: list[Problem]) -> None:
        size = self.bench.at_most or len(problems)
        for start in range(0, len(problems), size):
            part = problems[start : start + size]
            names = ", ".join(problem.name for problem in part)
            kept = self.context.piece(f"generated {names}", partial(self._generated, part))
            self.agrees.update(zip(part, kept["agrees"].tolist(), strict=True))

    def _generated(self, part: list[Problem]) -> dict[str, Tensor]:
        outcomes = [self.outcomes[problem] for problem in part]
        return {"agrees": torch.tensor(agrees_with_generation(self.bench, part, outcomes))}


@dataclass
class Standing:
    """One line: what is searched, how much is solved, the best loss, and the time left."""

    show: Callable[[str], None]
    n_seeds: int
    what: str = ""
    n_ended: int = 0
    n_solved: int = 0
    n_expected: int = 0
    best_loss: float = float("inf")
    start: float = field(default_factory=time.monotonic)
    shown: float = -math.inf

    def begin(self, what: str, done: int, expected: int) -> None:
        """A new round; the first of a search forgets the search before."""
        if what != self.what:
            self.what, self.n_ended, self.n_solved = what, 0, 0
            self.start = time.monotonic()
        self.n_expected = expected * self.n_seeds
        self.best_loss = float("inf")

    def passed(self, best_loss: float) -> None:
        """One pass was made."""
        self.best_loss = min(self.best_loss, best_loss)
        if time.monotonic() - self.shown >= SHOW_EVERY:
            self._show()

    def ended(self, loss: float, *, solved: bool) -> None:
        """One problem has ended."""
        self.n_ended += 1
        self.n_solved += int(solved)
        self.best_loss = min(self.best_loss, loss)
        self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        left = max(0, self.n_expected - self.n_ended)
        seconds = (time.monotonic() - self.start) / max(1, self.n_ended) * left
        eta = f"about {seconds:.0f} s left" if self.n_ended else "time left not known yet"
        self.show(
            f"{self.what}: {self.n_solved} of {self.n_ended} solved, best loss "
            f"{self.best_loss:.3g} nats, {eta}"
        )


def _part(outcome: Outcome) -> dict[str, Tensor]:
    numbers = [getattr(outcome, name) for name in Outcome._fields[1:]]
    return {
        "perturbation": outcome.perturbation,
        "numbers": torch.tensor([float(number) for number in numbers], dtype=torch.float64),
    }


def _outcome(part: dict[str, Tensor]) -> Outcome:
    n_correct, is_argmax, loss, n_steps, ratio = part["numbers"].tolist()
    return Outcome(part["perturbation"], int(n_correct), bool(is_argmax), loss, int(n_steps), ratio)
