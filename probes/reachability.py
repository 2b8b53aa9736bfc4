"""Reachability: which next tokens a short prompt put in front of a text can make the model say.

A state x_0 and a target token y are a pair. A control u of k tokens reaches y when

    argmax P(. | BOS + u + x_0) = y

Wanted is the shortest control of each pair, by the back-off procedure: k = 0 (is y the argmax
already?), greedy back-generation for k = 1, 2, 3, gradient coordinate search for k = 4, 6, 8, 10;
stop at the first success. The curve

    epsilon(k) = share of pairs that no control of at most k tokens reaches

is an upper bound, because a search only finds controls. ``method=brute-force`` is exact, for tiny
vocabularies. A bound on self-attention (``reachability_bound``) says the converse: what a head cannot
write, and, in a model that is one layer of attention, which targets no control reaches.

Paper: Bhargava et al. 2023, "What's the Magic Word? A Control Theory of LLM Prompting",
arXiv:2310.04444. Unlike their release: BOS stays before the control, the best control ever seen is
kept, the argmax is tested on every proposal, a tie is no success, states with the same tokens share
the sweep over the vocabulary, and intervals resample states.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from probes.reachability_bounded import excluded_pairs, head_bounds
from probes.reachability_epsilon import epsilon_curve, epsilon_interval
from probes.reachability_problems import (
    Problem,
    State,
    ground_truth_pairs,
    n_usable_tokens,
    read_states,
    uniform_pairs,
)
from probes.reachability_results import ReachabilityConfig, ReachabilityResult, padded_prompts
from probes.reachability_scoring import Scorer, require_gradients
from probes.reachability_search import MOST_ENUMERATED, Attempt
from probes.reachability_stages import Search
from probes.reachability_text import describe_pairs, reached_as_text
from workbench.context import Context
from workbench.errors import ConfigError, DataError
from workbench.models.base import ModelAdapter
from workbench.registry import probe

N_TOP = 75
"""Of the paper's top-75 data."""

__all__ = ["ReachabilityConfig", "ReachabilityResult", "measure_reachability"]


@probe(
    "reachability",
    config=ReachabilityConfig,
    result=ReachabilityResult,
    paper="arXiv:2310.04444",
    needs={"capture", "weights"},
)
def measure_reachability(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: ReachabilityConfig,
    context: Context | None = None,
) -> ReachabilityResult:
    """Search the shortest prompt that makes a model say a given token next."""
    context = context or Context()
    n_tokens = n_usable_tokens(model)
    _check(model, config, n_tokens)
    scorer = Scorer(model, config.memory_mb << 20, context.batch_size)
    problems = _problems(scorer, tokens, config, context)
    base = _base(scorer, problems, context)
    search = Search(scorer, config, context, n_tokens, problems)
    attempts = search.run(base["solved"])
    return _result(model, problems, base, attempts, (config, context))


def _check(model: ModelAdapter, config: ReachabilityConfig, n_tokens: int) -> None:
    """Refuse before anything runs."""
    if config.needs_gradients():
        require_gradients(model, config.method)
    if config.bos_id is not None and config.bos_id >= model.spec.d_vocab:
        raise ConfigError(
            f"bos_id must be below {model.spec.d_vocab}, the vocabulary of {model.spec.name}; got "
            f"{config.bos_id}"
        )
    n_controls = n_tokens**config.k_max
    if config.method == "brute-force" and n_controls > MOST_ENUMERATED:
        raise ConfigError(
            f"method=brute-force tries at most {MOST_ENUMERATED} controls a state; {n_tokens} tokens to "
            f"the power of k_max = {config.k_max} are {n_controls:.3g}; lower k_max or set "
            "method=back-off"
        )


def _problems(
    scorer: Scorer,
    tokens: Int[Tensor, "batch pos"],
    config: ReachabilityConfig,
    context: Context,
) -> list[Problem]:
    """Every pair of a state and a target."""
    model = scorer.model
    states, which, truths = read_states(model, tokens, config, context)
    if config.targets == "ground-truth":
        pairs = ground_truth_pairs(model.spec, which, truths)
    elif config.targets == "uniform":
        pairs = uniform_pairs(len(states), n_usable_tokens(model), config, context)
    else:
        best = [context.piece(f"top-{s.index}", partial(_top, model, s))["top"] for s in states]
        pairs = [(s, int(target)) for s, row in enumerate(best) for target in row]
    if not pairs:
        raise DataError("at least one pair of state and target is needed; the data has none")
    return [Problem(states[s], target, i) for i, (s, target) in enumerate(pairs)]


def _top(model: ModelAdapter, state: State) -> dict[str, Tensor]:
    """The model's most likely next tokens after a state."""
    row = state.rows(torch.zeros(1, 0, dtype=torch.long))
    return {"top": model.logits(row, last=1)[0, -1].topk(min(N_TOP, model.spec.d_vocab)).indices}


def _base(scorer: Scorer, problems: list[Problem], context: Context) -> dict[str, Tensor]:
    """The k = 0 check: rank, loss and whether the target is the argmax already; a piece a state."""
    by_state: dict[int, list[Problem]] = {}
    for problem in problems:
        by_state.setdefault(problem.state.index, []).append(problem)
    loss, rank = torch.zeros(len(problems)), torch.zeros(len(problems), dtype=torch.long)
    for number, members in by_state.items():
        found = context.piece(f"base-{number}", partial(_base_of_state, scorer, members))
        index = torch.tensor([problem.index for problem in members])
        loss[index], rank[index] = found["loss"], found["rank"]
    return {"loss": loss, "rank": rank, "solved": rank == 0}


def _base_of_state(scorer: Scorer, members: list[Problem]) -> dict[str, Tensor]:
    targets = torch.tensor([problem.target for problem in members])
    every = torch.arange(scorer.model.spec.d_vocab)
    row = members[0].state.rows(torch.zeros(1, 0, dtype=torch.long))
    losses = scorer.sweep(row, every).loss[0]
    # The target itself is counted by <=, so a rank of 0 is a strict argmax.
    rank = (losses[None] <= losses[targets, None]).sum(dim=1) - 1
    return {"loss": losses[targets], "rank": rank}


@dataclass(frozen=True)
class _Found:
    """The shortest control of each pair, or the best of those that failed."""

    k: Int[Tensor, " pair"]
    prompts: list[Tensor]
    loss: Tensor


def _shortest(base: dict[str, Tensor], attempts: list[list[Attempt]]) -> _Found:
    k, prompts, losses = [], [], []
    for solved, loss, tried in zip(base["solved"], base["loss"], attempts, strict=True):
        success = next((attempt for attempt in tried if attempt.solved), None)
        prompt = torch.zeros(0, dtype=torch.long) if success is None else success.prompt
        k.append(0 if bool(solved) else -1 if success is None else len(prompt))
        prompts.append(prompt)
        seen = [float(loss), *(attempt.loss for attempt in tried)]
        losses.append(min(seen) if success is None else success.loss)
    return _Found(torch.tensor(k), prompts, torch.tensor(losses))


def _result(
    model: ModelAdapter,
    problems: list[Problem],
    base: dict[str, Tensor],
    attempts: list[list[Attempt]],
    how: tuple[ReachabilityConfig, Context],
) -> ReachabilityResult:
    config, context = how
    found = _shortest(base, attempts)
    state = torch.tensor([problem.state.index for problem in problems])
    low, high = epsilon_interval(found.k, config.k_max, state, context.generator())
    lengths = [len(problem.state.tokens) for problem in problems]
    return ReachabilityResult(
        k=found.k,
        prompts=padded_prompts(found.prompts, config.k_max),
        epsilon=epsilon_curve(found.k, config.k_max),
        epsilon_low=low,
        epsilon_high=high,
        bound_excluded=excluded_pairs(model, problems, config.k_max, context),
        target_id=torch.tensor([problem.target for problem in problems]),
        state_index=state,
        state_length=torch.tensor(lengths),
        base_rank=base["rank"],
        base_loss=base["loss"],
        best_loss=found.loss,
        reached_as_text=reached_as_text(model, problems, found.k, found.prompts),
        **head_bounds(model, problems, found.k, found.prompts, context),
        config=config,
        labels=describe_pairs(model, problems, found.prompts),
    )
