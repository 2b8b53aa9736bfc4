"""Activation attacks: how many tokens a change of a few activations forces a model to say.

The attacker adds P of shape [a, d_model] to the residual stream at a positions of a context S (at
the input of one block) so that the next t tokens are T. P minimises the teacher-forced loss

    mean over i < t of -log p(T_i | S + P, T_<i)

by Adam with everything else frozen. A token is forced when its logit is above all others (strictly,
by ``margin``) on a fresh forward pass. t_max(a) is the t at which half succeeds: half of the tokens
("per-token") or all tokens in half of the cases ("all-correct"). The paper finds t_max = kappa a:

    kappa = sum(a t_max) / sum(a^2)           chi = d_model bits / (kappa log2 d_vocab)

chi, the attack resistance, is bits of activation per bit of output; beside it the slope of log t_max
on log a, and the same attack with tokens, whose chi is 1 / kappa_tokens.

Contexts and targets are uniform token ids; each seed keeps its own for all a and t, and t tokens are
the first t of its target. What is searched is the model that was loaded; nothing leaves the machine.

Paper: Fort 2023, "Scaling Laws for Adversarial Attacks on Language Model Activations",
arXiv:2312.02780. No code of it is public: optimiser, counts of cases and intervals are ours.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_bench import Cell, Problem, make_bench
from probes.activation_attacks_campaign import Campaign
from probes.activation_attacks_cases import (
    attacked_positions,
    dimension_mask,
    draw_cases,
    refuse_without_gradients,
)
from probes.activation_attacks_config import ActivationAttackConfig
from probes.activation_attacks_optimise import NO_TARGET
from probes.activation_attacks_results import ActivationAttackResult
from probes.activation_attacks_scaling import reached_half
from probes.activation_attacks_search import Curves, Search, find_limits, success_of
from workbench.context import Context
from workbench.errors import ConfigError
from workbench.models.base import ModelAdapter
from workbench.registry import probe


@probe(
    "activation-attacks",
    config=ActivationAttackConfig,
    result=ActivationAttackResult,
    paper="arXiv:2312.02780",
    needs={"capture", "continue", "edits", "generate", "gradients", "weights"},
    needs_data=False,
    takes_data=True,
)
def measure_activation_attacks(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: ActivationAttackConfig,
    context: Context | None = None,
) -> ActivationAttackResult:
    """Measure how many tokens a perturbation of a few positions can force."""
    context = context or Context()
    _check_model(model, config)
    campaign, cells = _prepare(model, tokens, config, context)
    limit = campaign.bench.cases.targets.shape[1]
    search = partial(find_limits, definition=config.definition)
    longest = Search(limit, config.resolution)
    curves = search(cells, longest, campaign.perturb, report=campaign.report("activations"))
    result = _result(campaign, cells, curves)
    if config.fractions:
        parts = [Cell(cells[-1].positions, share) for share in config.fractions]
        swept = search(parts, longest, campaign.perturb, report=campaign.report("dimensions"))
        result = _with_fractions(result, swept)
    if config.token_attack:
        shorter = Search(min(limit, config.token_limit), config.resolution)
        tried = search(cells, shorter, campaign.replace_tokens, report=campaign.report("tokens"))
        result = _with_tokens(result, tried)
    return result


def _check_model(model: ModelAdapter, config: ActivationAttackConfig) -> None:
    if config.layer >= model.spec.n_layers:
        raise ConfigError(
            f"layer must be below {model.spec.n_layers}, the layers of {model.spec.name}; got "
            f"{config.layer}"
        )
    if config.definition == "per-token" and model.spec.d_vocab <= 2:
        raise ConfigError(
            "definition=per-token needs more than 2 tokens, because half of them are forced by "
            f"chance; {model.spec.name} has {model.spec.d_vocab}; set definition=all-correct"
        )
    refuse_without_gradients(model, config.layer)


def _prepare(
    model: ModelAdapter, tokens: Tensor, config: ActivationAttackConfig, context: Context
) -> tuple[Campaign, list[Cell]]:
    cases = draw_cases(model, tokens, config, context)
    shares = (1.0, *config.fractions)
    masks = {
        share: dimension_mask(model.spec.d_model, config, share, context.generator())
        for share in shares
    }
    bench = replace(
        make_bench(model, config.layer, cases, masks),
        margin=config.margin,
        budget_bytes=config.memory_mb << 20,
        at_most=context.batch_size,
    )
    cells = [Cell(attacked_positions(config, a, context.generator())) for a in config.n_attacked]
    return Campaign(bench, config, context), cells


def _result(campaign: Campaign, cells: list[Cell], curves: Curves) -> ActivationAttackResult:
    config, bench = campaign.config, campaign.bench
    success = success_of(curves.accuracy, config.definition)
    t_max, censored = reached_half(curves.curve_t, success.mean(dim=-1))
    problems = [
        [[Problem(cell, t, row) for row in range(config.n_seeds)] for t in curves.curve_t.tolist()]
        for cell in cells
    ]

    def collect(name: str) -> Float[Tensor, "a t seed"]:
        found = [[[_number(campaign, p, name) for p in row] for row in rows] for rows in problems]
        return torch.tensor(found)

    contexts, positions, targets, perturbation = _examples(campaign, cells, curves)
    return ActivationAttackResult(
        torch.tensor(config.n_attacked),
        t_max,
        censored,
        success,
        curves.accuracy,
        curves.curve_t,
        collect("n_steps"),
        collect("norm_ratio"),
        collect("agrees"),
        contexts,
        positions,
        targets,
        perturbation,
        torch.tensor(bench.model.spec.d_vocab),
        config=config,
    )


def _number(campaign: Campaign, problem: Problem, name: str) -> float:
    if name == "agrees":
        return float(campaign.agrees.get(problem, torch.nan))
    outcome = campaign.outcomes.get(problem)
    return torch.nan if outcome is None else float(getattr(outcome, name))


def _examples(
    campaign: Campaign, cells: list[Cell], curves: Curves
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context, positions, target and perturbation of the longest fully forced target of each a."""
    cases = campaign.bench.cases
    found = [_longest(campaign, cell, curves.curve_t.tolist()) for cell in cells]
    n_target = max((problem.n_target for problem in found if problem), default=1)
    n_attacked = max(campaign.config.n_attacked)
    contexts = cases.contexts[torch.tensor([problem.row if problem else 0 for problem in found])]
    positions = torch.full((len(cells), n_attacked), NO_TARGET)
    targets = torch.full((len(cells), n_target), NO_TARGET)
    perturbation = torch.zeros(len(cells), n_attacked, campaign.bench.resid.shape[-1])
    for index, problem in enumerate(found):
        if problem is not None:
            places = torch.tensor(problem.cell.positions)
            positions[index, : len(places)] = places
            targets[index, : problem.n_target] = cases.targets[problem.row, : problem.n_target]
            perturbation[index, : len(places)] = campaign.outcomes[problem].perturbation
    return contexts, positions, targets, perturbation


def _longest(campaign: Campaign, cell: Cell, lengths: list[int]) -> Problem | None:
    tried = (Problem(cell, t, row) for t in lengths for row in range(campaign.config.n_seeds))
    forced = [
        problem
        for problem in tried
        if problem in campaign.outcomes and campaign.outcomes[problem].n_correct == problem.n_target
    ]
    return max(forced, key=lambda problem: problem.n_target, default=None)


def _with_fractions(result: ActivationAttackResult, swept: Curves) -> ActivationAttackResult:
    success = success_of(swept.accuracy, result.config.definition)
    t_max, _ = reached_half(swept.curve_t, success.mean(dim=-1))
    return replace(
        result,
        fraction=torch.tensor(result.config.fractions),
        t_max_fraction=t_max,
        success_fraction=success,
        curve_t_fraction=swept.curve_t,
    )


def _with_tokens(result: ActivationAttackResult, tried: Curves) -> ActivationAttackResult:
    success = success_of(tried.accuracy, result.config.definition)
    t_max, _ = reached_half(tried.curve_t, success.mean(dim=-1))
    return replace(result, t_max_tokens=t_max, success_tokens=success, curve_t_tokens=tried.curve_t)
