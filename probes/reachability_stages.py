"""The order of a search: lengths one after another, every finished pair kept at once.

All open pairs are tried at one length before any is at the next. What a pair's search of one length
found is kept in the store as soon as it is there, so a killed run goes on from it. A sweep of the
vocabulary that serves all targets of a state is one problem's work. Where a gradient search has several
pairs in work, it notes where they stand before the steps since the last note are more than one pair's
own: so a kill never costs more than the work of one pair at one length.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.reachability_problems import Problem
from probes.reachability_results import ReachabilityConfig
from probes.reachability_scoring import Scorer
from probes.reachability_search import (
    Attempt,
    Walk,
    enumerate_controls,
    gradient_search,
    greedy_step,
)
from workbench.context import Context

MOST_TOGETHER = 16
"""Problems that are searched in the same forward passes, where they are small enough."""


IN_WORK = "in work"
"""Name of the note about pairs that have not ended."""


@dataclass(eq=False)
class Search:
    """The search of all pairs."""

    scorer: Scorer
    config: ReachabilityConfig
    context: Context
    n_tokens: int
    problems: list[Problem]
    attempts: list[list[Attempt]] = field(default_factory=list)
    """Of each pair, one a length that was tried; the last is the success, if any."""

    def run(self, solved: Bool[Tensor, " pair"]) -> list[list[Attempt]]:
        """Try length after length; pairs that are ``solved`` without a control are left alone."""
        self.attempts = [[] for _ in self.problems]
        self._base = solved
        self._meter = Meter(self.context, len(self.config.stages()), len(self.problems))
        for stage, (k, how) in enumerate(self.config.stages()):
            self._meter.begin(stage, k, how, self._n_solved())
            still = [p for p in self.problems if not self._is_solved(p)]
            # A sweep of the vocabulary serves every target of a state.
            whole = how == "brute-force" or (how == "greedy" and k == 1 and not self._is_short())
            if whole:
                self._by_state(still, k)
            else:
                self._by_pair(still, k, self._greedy if how == "greedy" else self._gradient)
        self._meter.finish(self._n_solved())
        return self.attempts

    def _is_short(self) -> bool:
        return self.config.shortlist is not None and self.config.shortlist < self.n_tokens

    def _is_solved(self, problem: Problem) -> bool:
        tried = self.attempts[problem.index]
        return bool(self._base[problem.index]) or (bool(tried) and tried[-1].solved)

    def _n_solved(self) -> int:
        return sum(map(self._is_solved, self.problems))

    # One length

    def _by_state(self, still: Sequence[Problem], k: int) -> None:
        by_state: dict[int, list[Problem]] = {}
        for problem in still:
            by_state.setdefault(problem.state.index, []).append(problem)
        for index, members in by_state.items():

            def sweep(members: Sequence[Problem] = tuple(members)) -> dict[str, Tensor]:
                targets = [problem.target for problem in members]
                state = members[0].state
                found = enumerate_controls(self.scorer, state, targets, k, self.n_tokens)
                rows = [attempt.tensors() for attempt in found]
                return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

            kept = self.context.piece(f"k{k}-state-{index}", sweep)
            for i, problem in enumerate(members):
                attempt = Attempt.of({name: column[i] for name, column in kept.items()})
                self._add(problem, attempt)

    def _by_pair(
        self,
        still: Sequence[Problem],
        k: int,
        search: Callable[[Sequence[Problem], int], None],
    ) -> None:
        waiting = []
        for problem in still:
            kept = self._kept(problem, k)
            if kept is None:
                waiting.append(problem)
            else:
                self._add(problem, kept)
        if waiting:
            search(waiting, k)

    def _greedy(self, waiting: Sequence[Problem], k: int) -> None:
        for problem in waiting:
            tail = self._best_before(problem)
            how = (self.n_tokens, self.config.shortlist)
            (found,) = greedy_step(self.scorer, [problem], [tail], *how)
            self._keep(problem, k, found)

    def _gradient(self, waiting: Sequence[Problem], k: int) -> None:
        iterations = self.config.iterations
        noted = self.context.noted(IN_WORK) or {}

        def report(walk: Walk) -> None:
            assert walk.best is not None  # it has been scored
            self._meter.tell(f"step {walk.n_steps - 1} of {iterations}", walk.best.loss)
            if walk.ended(iterations):
                self._keep(walk.problem, k, walk.best)

        size = self._together(waiting, k)
        for start in range(0, len(waiting), size):
            walks = [self._walk(problem, k, noted) for problem in waiting[start : start + size]]
            notes = Notes(self.context, iterations + 1, k)
            gradient_search(self.scorer, walks, self.config, report, notes.stepped)

    def _together(self, waiting: Sequence[Problem], k: int) -> int:
        """Problems whose proposals fit into one forward pass, and whose step is one's own work."""
        n_pos = max(len(p.state.bos) + len(p.state.tokens) for p in waiting) + k
        fitting = self.scorer.rows_at_once(n_pos) // self.config.batch
        most = min(MOST_TOGETHER, self.config.iterations + 1, self.scorer.problems_at_once(n_pos))
        return max(1, min(most, fitting))

    def _walk(self, problem: Problem, k: int, noted: dict[str, Tensor]) -> Walk:
        """Random tokens in front of the best control of the length before; or as noted."""
        generator = problem.generator(self.context.seed, k)
        tail = self._best_before(problem)
        drawn = torch.randint(self.n_tokens, (k - len(tail),), generator=generator)
        walk = Walk(problem, torch.cat([drawn, tail]), generator, self.n_tokens)
        start = f"{_name(problem, k)} "
        own = {key.removeprefix(start): x for key, x in noted.items() if key.startswith(start)}
        if own:
            walk.go_on(own)
        return walk

    def _best_before(self, problem: Problem) -> Int[Tensor, " length"]:
        tried = self.attempts[problem.index]
        return tried[-1].prompt if tried else torch.zeros(0, dtype=torch.long)

    # What is kept

    def _kept(self, problem: Problem, k: int) -> Attempt | None:
        kept = self.context.kept(_name(problem, k))
        return None if kept is None else Attempt.of(kept)

    def _keep(self, problem: Problem, k: int, attempt: Attempt) -> None:
        self.context.piece(_name(problem, k), attempt.tensors)
        self._add(problem, attempt)

    def _add(self, problem: Problem, attempt: Attempt) -> None:
        self.attempts[problem.index].append(attempt)
        self._meter.advance(attempt)


def _name(problem: Problem, k: int) -> str:
    return f"k{k}-pair-{problem.index}"


@dataclass(eq=False)
class Notes:
    """Notes where walks stand, before the steps since the last note are more than one walk's own."""

    context: Context
    most: int
    """Steps of one walk."""
    k: int
    _unsaved: int = 0

    def stepped(self, going: Sequence[Walk]) -> None:
        """All walks have made a step; ``going`` will make another."""
        self._unsaved += len(going)
        if len(going) > 1 and self._unsaved + len(going) > self.most:
            parts = {
                f"{_name(walk.problem, self.k)} {name}": value
                for walk in going
                for name, value in walk.tensors().items()
            }
            self.context.note(IN_WORK, parts)
            self._unsaved = 0


class Meter:
    """Tells how far a search is: best loss, pairs solved, time left at most."""

    def __init__(self, context: Context, n_stages: int, n_pairs: int) -> None:
        self._context = context
        self._n_stages, self._n_pairs = n_stages, n_pairs
        self._stage, self._what, self._n_solved, self._done = 0, "", 0, 0
        self._best = float("inf")
        self._stage_start = self._last_told = time.monotonic()
        self._in_stage = 0

    def begin(self, stage: int, k: int, how: str, n_solved: int) -> None:
        """Enter the search of one length."""
        self._stage, self._what, self._n_solved = stage, f"k = {k}, {how}", n_solved
        self._in_stage, self._stage_start = 0, time.monotonic()
        self._best = float("inf")
        self._progress()

    def advance(self, attempt: Attempt) -> None:
        """One pair has been tried at this length."""
        self._in_stage += 1
        self._n_solved += attempt.solved
        self.tell("", attempt.loss)
        self._progress()

    def finish(self, n_solved: int) -> None:
        """The search is over."""
        self._stage, self._n_solved, self._in_stage = self._n_stages, n_solved, 0
        self._progress()

    def tell(self, detail: str, loss: float) -> None:
        """Show a line, at most twice a second."""
        self._best = min(self._best, loss)
        now = time.monotonic()
        if now - self._last_told < 0.5:
            return
        self._last_told = now
        parts = [self._what, detail, f"best loss {self._best:.3g}"]
        parts += [f"{self._n_solved} of {self._n_pairs} solved", self._eta(now)]
        self._context.status("; ".join(filter(None, parts)))

    def _eta(self, now: float) -> str:
        if not self._in_stage:
            return ""
        open_pairs = self._n_pairs - self._n_solved
        left = open_pairs * (self._n_stages - self._stage) - self._in_stage
        seconds = max(0, left) * (now - self._stage_start) / self._in_stage
        return f"at most {seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def _progress(self) -> None:
        # A solved pair has all its lengths behind it.
        tried = min(self._in_stage, self._n_pairs - self._n_solved)
        open_pairs = self._n_pairs - self._n_solved
        done = self._n_solved * self._n_stages + open_pairs * self._stage + tried
        total = self._n_pairs * self._n_stages
        self._context.progress(min(done, total), total)
