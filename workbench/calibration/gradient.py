"""ZeroTuning's first-order effect of all heads from one backward pass.

    g[layer, head] = d objective / d log gamma at gamma = 1

With o a head's output, a_0 its weight on the first key and v_0 that key's value, d o / d log gamma is
a_0 (v_0 - o) at gamma = 1: one backward pass through the edit itself gives every head's number. It is
a proxy: finite factors decide. Card: zerotuning section 3, "suggested engineering".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.attention.edits import AttentionCall, AttentionEdit, Edit
from workbench.calibration.effects import Answers, Work
from workbench.evaluation.scoring import Encoded, pad_left
from workbench.interventions.zerotuning import scale_first_key
from workbench.models.base import ModelAdapter, ModelSpec, Site, require


@dataclass(frozen=True, eq=False)
class LogGammas:
    """ZeroTuning with a factor for every head, given by its logarithm; can be differentiated."""

    log_gamma: Float[Tensor, "layer head"]
    name: str = "log-gammas"

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer, also where every factor is 1."""
        return [self._edit(layer) for layer in range(spec.n_layers)]

    def _edit(self, layer: int) -> AttentionEdit:
        def output(call: AttentionCall, z: Tensor) -> Tensor:
            first = call.first_key_index()[:, None]
            weight, value = call.weights(first)[..., 0], call.values(first)[:, :, 0]
            gamma = self.log_gamma[layer].to(z.device).exp()[None, :, None]
            return scale_first_key(z, weight, value, gamma).to(z.dtype)

        return AttentionEdit(layer, output, None)


def gradient_profile(
    model: ModelAdapter,
    questions: Sequence[Encoded],
    objective: str,
    batch_size: int,
    work: Work,
) -> Float[Tensor, "layer head"]:
    """Effect of log gamma of every head on the mean objective, at 1, by one backward pass a batch.

    Args:
        model: Needs gradients (hf).
        questions: What the objective is averaged over.
        objective: ``entropy`` (its negative grows) or ``accuracy`` (through the margin, its smooth
            companion).
        batch_size: Questions at once.
        work: Is counted up; a backward pass counts as two forward passes.

    Raises:
        CapabilityError: The backend has no gradients.
    """
    require(model, frozenset({"gradients", "continue"}), "the gradient profile")
    total = torch.zeros(model.spec.n_layers, model.spec.n_heads)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        tokens, mask = pad_left([item.prompt for item in batch])
        resid = model.capture(tokens, [Site("resid_pre", 0)], attention_mask=mask)[
            Site("resid_pre", 0)
        ]
        log_gamma = torch.zeros_like(total, requires_grad=True)
        with model.edit(LogGammas(log_gamma)):
            logits = model.continue_from(0, resid.requires_grad_(), mask, last=1)[:, 0]
        answers = Answers.of(logits, batch)
        score = -answers.entropy if objective == "entropy" else answers.margin
        (gradient,) = torch.autograd.grad(score.sum(), log_gamma)
        total += gradient.cpu()
        work.layer_forwards += 3 * len(batch) * model.spec.n_layers
    return total / len(questions)
