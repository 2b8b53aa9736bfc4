"""Searches for a control: all of them, greedy back-generation, gradient coordinate search.

Greedy back-generation (Algorithm 2) puts the best single token in front of the control found so far;
for k = 1 it is exact. Gradient coordinate search (Algorithm 3) proposes single swaps among the tokens
with the best gradient and goes on from the best proposal by true loss.

Unlike the paper's release, the gradient search tests the argmax on every proposal at every step,
keeps the best control ever seen, and never scores a control twice: a step that finds nothing new
starts again at random. Proposals of a step come in the order of the place they change.

Paper: Bhargava et al. 2023, arXiv:2310.04444, appendix; GCG: Zou et al. 2023, arXiv:2307.15043.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.reachability_problems import Problem, State
from probes.reachability_results import ReachabilityConfig
from probes.reachability_scoring import Scorer, Scores, token_gradients

ENUMERATED_AT_ONCE = 1 << 16
MOST_ENUMERATED = 1 << 22
"""Controls that brute force is willing to try for a state."""


@dataclass(frozen=True)
class Attempt:
    """The best control of one length for one problem."""

    prompt: Int[Tensor, " k"]
    loss: float
    """-ln P(target), nats."""
    solved: bool

    def tensors(self) -> dict[str, Tensor]:
        """As a piece that can be kept."""
        return {
            "prompt": self.prompt,
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            "solved": torch.tensor(self.solved),
        }

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Attempt":
        """Back from a kept piece."""
        return Attempt(tensors["prompt"], float(tensors["loss"]), bool(tensors["solved"]))


def best_attempt(
    controls: Int[Tensor, "n k"], loss: Float[Tensor, " n"], winner: Int[Tensor, " n"], target: int
) -> Attempt:
    """The control with the lowest loss among those that reach the target, else among all."""
    reached = winner == target
    solved = bool(reached.any())
    # A lower loss without the argmax is no success.
    best = int(loss.masked_fill(~reached, torch.inf).argmin() if solved else loss.argmin())
    return Attempt(controls[best].clone(), float(loss[best]), solved)


def _better(one: Attempt | None, other: Attempt) -> Attempt:
    if one is None or (other.solved, -other.loss) > (one.solved, -one.loss):
        return other
    return one


# Every control


def enumerate_controls(
    scorer: Scorer, state: State, targets: Sequence[int], k: int, n_tokens: int
) -> list[Attempt]:
    """Try every control of exactly ``k`` tokens; one pass serves all targets of the state."""
    found: list[Attempt | None] = [None] * len(targets)
    for start in range(0, n_tokens**k, ENUMERATED_AT_ONCE):
        end = min(start + ENUMERATED_AT_ONCE, n_tokens**k)
        controls = _digits(torch.arange(start, end), k, n_tokens)
        scores = scorer.sweep(state.rows(controls), torch.tensor(list(targets)))
        for i, target in enumerate(targets):
            tried = best_attempt(controls, scores.loss[:, i], scores.winner, target)
            found[i] = _better(found[i], tried)
    return [attempt for attempt in found if attempt is not None]


def _digits(numbers: Int[Tensor, " n"], k: int, base: int) -> Int[Tensor, "n k"]:
    powers = base ** torch.arange(k - 1, -1, -1)
    return numbers[:, None] // powers % base


# Greedy back-generation


def greedy_step(
    scorer: Scorer,
    problems: Sequence[Problem],
    tails: Sequence[Int[Tensor, " _"]],
    n_tokens: int,
    shortlist: int | None = None,
) -> list[Attempt]:
    """Put the best single token in front of each problem's tail.

    Args:
        scorer: Of the model.
        problems: Searched together.
        tails: The control found so far, one a problem.
        n_tokens: Ids below this are tried.
        shortlist: Only so many, those with the best gradient; None: all.
    """
    controls = []
    for problem, tail in zip(problems, tails, strict=True):
        first = torch.arange(n_tokens)
        if shortlist is not None and shortlist < n_tokens:
            first = _shortlisted(scorer, problem, tail, n_tokens)[:shortlist]
        controls.append(torch.cat([first[:, None], tail.expand(len(first), -1)], dim=1))
    return _attempts(controls, score_controls(scorer, problems, controls), problems)


def _shortlisted(
    scorer: Scorer, problem: Problem, tail: Int[Tensor, " tail"], n_tokens: int
) -> Int[Tensor, " n_tokens"]:
    """Tokens by the gradient at the new place, where for once the token after it stands."""
    stand_in = tail[:1] if len(tail) else problem.state.tokens[:1]
    row = problem.state.rows(torch.cat([stand_in, tail])[None])
    n_bos = len(problem.state.bos)
    where, target = slice(n_bos, n_bos + 1), torch.tensor([problem.target])
    scores = token_gradients(scorer.model, row, target, where)
    return scores[0, 0, :n_tokens].argsort()


def score_controls(
    scorer: Scorer, problems: Sequence[Problem], controls: Sequence[Int[Tensor, "_ _"]]
) -> list[Scores]:
    """Score each problem's controls for its target, all problems together."""
    pairs = zip(problems, controls, strict=True)
    return scorer.score_groups([(problem.state.rows(u), problem.target) for problem, u in pairs])


def _attempts(
    controls: Sequence[Tensor], scores: Sequence[Scores], problems: Sequence[Problem]
) -> list[Attempt]:
    rows = zip(controls, scores, problems, strict=True)
    return [best_attempt(u, found.loss, found.winner, p.target) for u, found, p in rows]


# Gradient coordinate search


@dataclass(eq=False)
class Walk:
    """Where the gradient search of one problem stands."""

    problem: Problem
    current: Int[Tensor, " k"]
    generator: torch.Generator
    n_tokens: int
    best: Attempt | None = None
    seen: Int[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Hashes of the controls that were scored."""
    n_steps: int = 0
    """Steps behind it; the first scores what it began with."""

    def tensors(self) -> dict[str, Tensor]:
        """As a note of where it stands."""
        assert self.best is not None  # it has been scored
        return {
            **{f"best_{name}": value for name, value in self.best.tensors().items()},
            "current": self.current,
            "seen": self.seen,
            "generator": self.generator.get_state(),
            "n_steps": torch.tensor(self.n_steps),
        }

    def go_on(self, noted: dict[str, Tensor]) -> None:
        """Stand where a note says."""
        self.best = Attempt.of(
            {name: noted[f"best_{name}"] for name in ("prompt", "loss", "solved")}
        )
        self.current, self.seen = noted["current"], noted["seen"]
        self.generator.set_state(noted["generator"])
        self.n_steps = int(noted["n_steps"])

    def ended(self, iterations: int) -> bool:
        """Whether it has succeeded or used its steps up."""
        solved = self.best is not None and self.best.solved
        return solved or self.n_steps > iterations

    def fresh(self, controls: Int[Tensor, "n k"]) -> Int[Tensor, "m k"]:
        """Those not scored before, each once, in their order; a random one if there is none."""
        hashes = _hashes(controls)
        new = ~torch.isin(hashes, self.seen)
        if not bool(new.any()):
            k = controls.shape[1]
            self.current = torch.randint(self.n_tokens, (k,), generator=self.generator)
            return self.current[None]
        return _unique(controls[new], hashes[new])

    def update(self, controls: Int[Tensor, "n k"], scores: Scores) -> None:
        """Go to the best of the step, even if it is worse; remember the best ever."""
        attempt = best_attempt(controls, scores.loss, scores.winner, self.problem.target)
        self.current = attempt.prompt
        self.best = _better(self.best, attempt)
        self.seen = torch.cat([self.seen, _hashes(controls)])
        self.n_steps += 1


def propose(
    current: Int[Tensor, " k"],
    scores: Float[Tensor, "k token"],
    config: ReachabilityConfig,
    generator: torch.Generator,
) -> Int[Tensor, "n k"]:
    """Single swaps: place and token uniform among the best candidates, none twice, none empty.

    Args:
        current: The control that is changed.
        scores: First-order loss of each token at each place.
        config: ``candidates`` a place, ``batch`` swaps (fewer where there are not so many).
        generator: Draws them.
    """
    k, n_candidates = len(current), min(config.candidates, scores.shape[1])
    best = scores.topk(n_candidates, dim=1, largest=False).indices
    drawn = torch.randperm(k * n_candidates, generator=generator)[: config.batch]
    place = drawn.sort().values // n_candidates
    token = best.flatten()[drawn.sort().values]
    changed = token != current[place]
    place, token = place[changed], token[changed]
    controls = current.repeat(len(place), 1)
    controls[torch.arange(len(place)), place] = token
    return controls


def gradient_search(
    scorer: Scorer,
    walks: Sequence[Walk],
    config: ReachabilityConfig,
    report: Callable[[Walk], None],
    stepped: Callable[[Sequence[Walk]], None] = lambda _: None,
) -> None:
    """Search for controls of one length, for several problems at once.

    Args:
        scorer: Of the model.
        walks: Each stops at its first success; what it found is in ``best``.
        config: Steps, candidates and batch.
        report: Called with each walk after each of its steps.
        stepped: Called after all have made a step, with those that go on.
    """
    going = [walk for walk in walks if not walk.ended(config.iterations)]
    while going:
        controls = _proposals(scorer, going, config)
        scores = score_controls(scorer, [walk.problem for walk in going], controls)
        for walk, tried, found in zip(going, controls, scores, strict=True):
            walk.update(tried, found)
            report(walk)
        going = [walk for walk in going if not walk.ended(config.iterations)]
        stepped(going)


def _proposals(
    scorer: Scorer, walks: Sequence[Walk], config: ReachabilityConfig
) -> list[Int[Tensor, "_ _"]]:
    """What every walk began with, or new controls, from gradients taken together."""
    found = {i: walk.current[None] for i, walk in enumerate(walks) if not walk.n_steps}
    rows = [walk.problem.state.rows(walk.current[None]) for walk in walks]
    begins = [len(walk.problem.state.bos) for walk in walks]
    for shape in sorted({(row.shape[1], n_bos) for row, n_bos in zip(rows, begins, strict=True)}):
        members = [
            i for i, row in enumerate(rows) if (row.shape[1], begins[i]) == shape and i not in found
        ]
        if not members:
            continue
        targets = torch.tensor([walks[i].problem.target for i in members])
        where = slice(shape[1], shape[1] + len(walks[members[0]].current))
        batch = torch.cat([rows[i] for i in members])
        scores = token_gradients(scorer.model, batch, targets, where)
        for i, score in zip(members, scores, strict=True):
            walk = walks[i]
            swaps = propose(walk.current, score[:, : walk.n_tokens], config, walk.generator)
            found[i] = walk.fresh(swaps)
    return [found[i] for i in range(len(walks))]


def _hashes(controls: Int[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """64-bit hashes of rows; sums wrap. Two that collide cost one proposal, never a wrong one."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (controls.shape[1],), generator=generator) * 2 + 1
    return (controls * factors).sum(dim=1)


def _unique(controls: Int[Tensor, "n k"], hashes: Int[Tensor, " n"]) -> Int[Tensor, "m k"]:
    """The first of each, in their order."""
    _, inverse = hashes.unique(return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(hashes)).scatter_reduce(
        0, inverse, torch.arange(len(hashes)), "amin"
    )
    return controls[first.sort().values]
