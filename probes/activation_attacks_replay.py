"""Replays perturbations: as an intervention, under which the model generates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activation_attacks_bench import Bench, Outcome, Problem, perturbed
from workbench.attention.edits import ActivationEdit, Edit
from workbench.models.base import ModelAdapter, ModelSpec, Site


@dataclass(frozen=True, eq=False)
class PerturbPositions:
    """Adds a perturbation to the residual stream of some positions of the prompt.

    ``with model.edit(PerturbPositions(...)): model.generate(context)`` replays an attack: tokens that
    are generated later are not perturbed.
    """

    layer: int
    positions: Int[Tensor, "batch n_attacked"]
    perturbation: Float[Tensor, "batch n_attacked d_model"]
    n_prompt: int
    """Tokens of the prompt, at least 2: shorter passes are those of a cache, for later tokens."""
    name: str = "perturb-positions"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit, at the input of the layer."""
        return [ActivationEdit(Site("resid_pre", self.layer), self._add)]

    def _add(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if x.shape[1] < self.n_prompt:
            return x
        # Added in float32, as in the search.
        whole = perturbed(
            x.float(), self.positions.to(x.device), self.perturbation.float().to(x.device)
        )
        return whole.to(x)


def generate_greedily(
    model: ModelAdapter, tokens: Int[Tensor, "batch pos"], n_new: int
) -> Int[Tensor, "batch n_new"]:
    """The most likely continuation; it does not stop at an end of text, which a target may hold."""
    options = {} if model.backend == "toy" else {"do_sample": False, "eos_token_id": None}
    generated: Tensor = model.generate(tokens, max_new_tokens=n_new, **options)
    return generated[:, tokens.shape[1] :]


def agrees_with_generation(
    bench: Bench, problems: Sequence[Problem], outcomes: Sequence[Outcome]
) -> list[bool]:
    """Whether greedy generation equals the target exactly where every target token is the argmax."""
    if not problems:
        return []
    rows = torch.tensor([problem.row for problem in problems])
    n_attacked = max(len(problem.cell.positions) for problem in problems)
    positions = torch.zeros(len(problems), n_attacked, dtype=torch.long)
    perturbation = torch.zeros(len(problems), n_attacked, bench.resid.shape[-1])
    for index, (problem, outcome) in enumerate(zip(problems, outcomes, strict=True)):
        places = problem.cell.positions
        positions[index, : len(places)] = torch.tensor(places)
        perturbation[index, : len(places)] = outcome.perturbation
    edit = PerturbPositions(bench.layer, positions, perturbation, bench.n_context)
    n_new = max(problem.n_target for problem in problems)
    with bench.model.edit(edit):
        generated = generate_greedily(bench.model, bench.cases.contexts[rows], n_new)
    return [
        outcome.is_argmax
        == torch.equal(
            generated[index, : problem.n_target],
            bench.cases.targets[problem.row, : problem.n_target],
        )
        for index, (problem, outcome) in enumerate(zip(problems, outcomes, strict=True))
    ]
