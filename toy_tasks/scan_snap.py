"""Scan and snap: attention first scans for distinct tokens, then freezes.

One attention layer and a decoder learn to predict the next token of sequences whose classes have
common and distinct tokens. While it learns, attention leaves the common tokens and gathers on those
distinct tokens that are the most frequent in their class ("scan"); then the decoder has learnt
enough, the gradient of attention vanishes and its pattern stays as it is ("snap"). The class law
stands in ``scan_snap_data``, the model and its gradient in ``scan_snap_dynamics``.

Along training, with P(l|n) the law of class n and m = psi(n) its query:

    c_n[l]      P(l|n) exp(Z[m, l]) over its sum: attention in infinitely long sequences
    entropy     -sum d ln d in nats, d = c_n among the distinct tokens of n; mean over classes
    growth      chi_l = exp(2 (Z[m, l] - Z[m, l] at the start))
    snap step   first checkpoint t for which max |Z(t+5) - Z(t)| is under 5 % of its peak so far

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
Momentum 0.9 and sequences of 127 contextual tokens are those of their runs, not of their theory;
attention is computed on token counts. The snap detector is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toy_tasks.scan_snap_data import ClassLaw, ScanSnapConfig, class_law
from toy_tasks.scan_snap_dynamics import class_attention, common_mass, distinct_entropy
from toy_tasks.scan_snap_run import SAVE_EVERY, Log, Run
from toy_tasks.training import Progress, deferred_interrupt
from workbench.registry import toy_task

SNAP_WINDOW = 5
"""Steps over which the change of Z is taken."""
SNAP_SHARE = 0.05

# Result


@dataclass(frozen=True)
class ScanSnapResult:
    """One training run; the first entry is before the first update, the last after the last."""

    step: Int[Tensor, " checkpoint"]
    """Updates done."""
    loss: Float[Tensor, " checkpoint"]
    """Of a fresh batch with the weights of the checkpoint, in nats."""
    z: Float[Tensor, "checkpoint query token"]
    """Rows of Z by query; the others are never used."""
    attention: Float[Tensor, "checkpoint class token"]
    """c_n; rows sum to 1."""
    entropy: Float[Tensor, " checkpoint"]
    """Of attention among distinct tokens, in nats, from 0 to ln n_distinct."""
    snap_step: Int[Tensor, ""]
    """-1: attention had not frozen by the end."""
    config: ScanSnapConfig = field(default_factory=ScanSnapConfig)

    def law(self) -> ClassLaw:
        """What the sequences were drawn from."""
        return class_law(self.config)

    def common_mass(self) -> Float[Tensor, " checkpoint"]:
        """Share of attention on common tokens, mean over classes."""
        return common_mass(self.attention, self.law()).mean(dim=-1)

    def class_z(self) -> Float[Tensor, "checkpoint class token"]:
        """Z of each class's query."""
        return self.z[:, self.law().query]

    def growth(self) -> Float[Tensor, "checkpoint query token"]:
        """chi, 1 at the start."""
        return (2 * (self.z - self.z[0])).exp()

    def metrics(self) -> dict[str, float]:
        """The headline numbers: the end of the run beside its beginning."""
        mass = self.common_mass()
        return {
            "loss": self.loss[-1].item(),
            "first_loss": self.loss[0].item(),
            "entropy": self.entropy[-1].item(),
            "first_entropy": self.entropy[0].item(),
            "common_mass": mass[-1].item(),
            "first_common_mass": mass[0].item(),
            "snap_step": float(self.snap_step),
            "n_steps": float(self.step[-1]),
            "n_tokens": float(self.config.n_tokens),
            "n_classes": float(self.config.n_classes),
        }

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a class: where its attention went."""
        law, last = self.law(), self.attention[-1]
        growth = self.growth()[-1][law.query]
        dominant = (last * law.is_distinct).argmax(dim=1, keepdim=True)
        return {
            "class": torch.arange(len(law.prob)).tolist(),
            "query": law.query.tolist(),
            "common_mass": common_mass(last, law).tolist(),
            "entropy": distinct_entropy(last, law).tolist(),
            "dominant_token": dominant[:, 0].tolist(),
            "dominant_attention": last.gather(1, dominant)[:, 0].tolist(),
            "dominant_growth": growth.gather(1, dominant)[:, 0].tolist(),
        }


# Mathematics


def snap_step(
    step: Int[Tensor, " checkpoint"], z: Float[Tensor, "checkpoint query token"]
) -> Int[Tensor, ""]:
    """Find the first step from which Z hardly moves; see the module's docstring.

    Checkpoints further apart than five steps are compared with the next one.
    """
    gap = int(step[1] - step[0]) if len(step) > 1 else 1
    window = max(1, round(SNAP_WINDOW / gap))
    change = (z[window:] - z[:-window]).abs().amax(dim=(1, 2))
    if not len(change):
        return torch.tensor(-1)
    frozen = change < SNAP_SHARE * change.cummax(dim=0).values
    return step[int(frozen.int().argmax())] if bool(frozen.any()) else torch.tensor(-1)


# Training


@toy_task(
    "scan-snap", config=ScanSnapConfig, result=ScanSnapResult, paper="arXiv:2305.16380", version=2
)
def train_scan_snap(
    config: ScanSnapConfig, out_dir: Path, progress: Callable[[Progress], None] | None = None
) -> ScanSnapResult:
    """Train attention and decoder on sequence classes, and record how attention freezes.

    The folder gets metrics.jsonl while it runs, resume.safetensors to go on from, and at the end
    model.safetensors (Y and Z, float64) with config.json.

    Raises:
        TrainingError: the run diverged, or the folder holds a run of other settings. What was
            recorded before is kept.
        KeyboardInterrupt: after Ctrl-C, once the step in hand is finished and saved.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    run = Run(config, out_dir)
    log = Log(run, progress)
    with deferred_interrupt() as interrupted:
        while not run.is_complete:
            run.advance()
            log.write()
            if run.done % SAVE_EVERY == 0 or run.is_complete or interrupted.is_set():
                run.save()
            if interrupted.is_set() and not run.is_complete:
                raise KeyboardInterrupt
    run.save_model()
    return _result(config, run)


def _result(config: ScanSnapConfig, run: Run) -> ScanSnapResult:
    law = class_law(config)
    step, z = torch.tensor(run.steps), torch.stack(run.z)
    c = class_attention(z, law)
    return ScanSnapResult(
        step,
        torch.tensor(run.losses, dtype=torch.float32),
        z.float(),
        c.float(),
        distinct_entropy(c, law).mean(dim=-1).float(),
        snap_step(step, z),
        config,
    )
