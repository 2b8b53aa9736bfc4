"""Bigram-Backcopy: a small transformer grows an attention sink, step by step on record.

Sequences follow a bigram law, except that after a trigger the character before it is copied (see
``toy_tasks.bigram_law``). Attention is needed after triggers only; on all other queries the head
is dormant and parks its attention on <s>, whose value is drained so that it does no harm. Sink
logit, value drain and (in deeper models) residual peak grow together: "mutual reinforcement".

Along training, on a log schedule, every checkpoint is measured (``toy_tasks.bigram_measure``)
and measured again under ablations (``toy_tasks.bigram_ablations``): attention or MLP of a block
skipped, a head zeroed, a head's attention moved to <s>. Theory is in
``toy_tasks.bigram_backcopy_theory``.

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835. Defaults are a size
that trains in half a minute on one core, where they take d_model 256, 256 positions, batches of
512, lr 3e-4 and 10000 steps. Risks leave out position 0, where their oracle is not the true law.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.bigram_batches import Batches
from toy_tasks.bigram_config import BigramBackcopyConfig
from toy_tasks.bigram_law import BigramLaw, guessing_risk, make_law, read_counts, sample
from toy_tasks.bigram_measure import HeldOut, observe
from toy_tasks.bigram_record import headline, measure_checkpoints
from toy_tasks.model import ToyModel, describe_model, make_model
from toy_tasks.training import Progress, TrainingError, train, weights_of, write_safetensors
from workbench.registry import toy_task

__all__ = ["BigramBackcopyConfig", "BigramBackcopyResult", "make_loss", "train_bigram_backcopy"]

HELD_OUT_SEED = 2**40
"""Far from every training step's seed."""
DIVERGED = 10.0
"""A loss this many times that of guessing is no learning any more; random weights have 1."""


@dataclass(frozen=True)
class BigramBackcopyResult:
    """One run: what was measured at every checkpoint, and the law it was trained on."""

    step: Int[Tensor, " checkpoint"]
    """Updates done; ascending, the last is the end of training."""
    sink_attention: Float[Tensor, " checkpoint"]
    """Mean over layers and heads, in [0, 1] for kernels whose rows sum to 1."""
    sink_logit_gap: Float[Tensor, " checkpoint"]
    """Mean over layers and heads."""
    value_norm_bos: Float[Tensor, " checkpoint"]
    """After W_O; mean over layers and heads."""
    value_norm_rest: Float[Tensor, " checkpoint"]
    value_norm_stationary: Float[Tensor, " checkpoint"]
    """What theory lets ``value_norm_bos`` come to: the norm that cancels what the other tokens add
    on average. NaN without a sink."""
    resid_norm_bos: Float[Tensor, " checkpoint"]
    """At the depth where <s> stands out most at the end of training."""
    resid_norm_rest: Float[Tensor, " checkpoint"]
    backcopy_risk: Float[Tensor, " checkpoint"]
    """Excess, in nats."""
    bigram_risk: Float[Tensor, " checkpoint"]
    """Excess, in nats; position 0 left out."""
    backcopy_risk_ablated: Float[Tensor, "ablation checkpoint"]
    bigram_risk_ablated: Float[Tensor, "ablation checkpoint"]
    resid_peak_ablated: Float[Tensor, "ablation checkpoint"]
    """Residual norm of <s> over that of the rest, after the block behind which it is largest at the
    end of training (``resid_norm_*`` may be largest before all blocks)."""
    sink_attention_by_head: Float[Tensor, "checkpoint layer head"]
    sink_logit_gap_by_head: Float[Tensor, "checkpoint layer head"]
    sink_logit_gap_by_token: Float[Tensor, "checkpoint d_vocab"]
    """By the query's token; NaN for triggers and tokens that do not occur."""
    sink_logit_std: Float[Tensor, " checkpoint"]
    """Over queries, of the score at <s>."""
    other_logit_std: Float[Tensor, " checkpoint"]
    """Over queries and keys, of the other scores."""
    sink_logit_spread_by_layer: Float[Tensor, "checkpoint layer"]
    """Over tokens, of the mean score at <s> of their queries: small when sink logits concentrate."""
    other_logit_spread_by_layer: Float[Tensor, "checkpoint layer"]
    """Over queries and keys, of the other scores."""
    bias_attention: Float[Tensor, " checkpoint"]
    """Attention to a learned key; 0 without one."""
    resid_norm_bos_by_depth: Float[Tensor, "checkpoint depth"]
    resid_norm_rest_by_depth: Float[Tensor, "checkpoint depth"]
    pattern: Float[Tensor, "snapshot layer head q_pos k_pos"]
    """Attention in the first held-out sequence, its first 64 positions, at a few checkpoints."""
    pattern_step: Int[Tensor, " snapshot"]
    sample_tokens: Int[Tensor, "row longer"]
    """The held-out sequences."""
    triggers: Int[Tensor, " trigger"]
    unigram: Float[Tensor, " d_vocab"]
    transition: Float[Tensor, "d_vocab next_token"]
    """The row of <s> is the law of the first character."""
    labels: dict[str, tuple[str, ...]]
    backcopy_risk_circuit: Float[Tensor, " circuit"] | None = None
    """At the end of training, of models with three blocks or more, as all of ``_circuit``."""
    bigram_risk_circuit: Float[Tensor, " circuit"] | None = None
    sink_logit_gap_circuit: Float[Tensor, " circuit"] | None = None
    """Of block 1."""
    value_norm_bos_circuit: Float[Tensor, " circuit"] | None = None
    """Of block 1."""
    resid_norm_excess_circuit: Float[Tensor, " circuit"] | None = None
    """After block 0: |h| of <s> minus that of the rest."""
    config: BigramBackcopyConfig = field(default_factory=BigramBackcopyConfig)

    def without_attention(self, risk: Float[Tensor, "ablation checkpoint"]) -> float:
        """The largest final risk with one block's attention skipped."""
        rows = [name.startswith("no_attention") for name in self.labels["ablation"]]
        return risk[torch.tensor(rows), -1].max().item()

    def peak_maker(self) -> str:
        """The part (``no_attention:L0``, ...) without which the residual peak falls most."""
        names = self.labels["ablation"]
        parts = [index for index, name in enumerate(names) if name.startswith("no_")]
        return names[parts[int(self.resid_peak_ablated[parts, -1].argmin())]]

    def data_hash(self) -> str:
        """Hash of the law and of the held-out sequences, which the settings do not tell whole."""
        digest = hashlib.sha256()
        for tensor in (self.unigram, self.transition, self.triggers, self.sample_tokens):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def metrics(self) -> dict[str, float]:
        """The headline numbers, at the end of training."""
        return {
            "sink_attention": self.sink_attention[-1].item(),
            "sink_logit_gap": self.sink_logit_gap[-1].item(),
            "value_drain": (self.value_norm_bos[-1] / self.value_norm_rest[-1]).item(),
            "resid_peak_ratio": (self.resid_norm_bos[-1] / self.resid_norm_rest[-1]).item(),
            "backcopy_risk": self.backcopy_risk[-1].item(),
            "bigram_risk": self.bigram_risk[-1].item(),
            "backcopy_risk_no_attention": self.without_attention(self.backcopy_risk_ablated),
            "bigram_risk_no_attention": self.without_attention(self.bigram_risk_ablated),
            "bias_attention": self.bias_attention[-1].item(),
            "sink_logit_std": self.sink_logit_std[-1].item(),
            "other_logit_std": self.other_logit_std[-1].item(),
            "n_steps": float(self.step[-1].item()),
        }

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a checkpoint."""
        return {
            "step": self.step.tolist(),
            "sink_attention": self.sink_attention.tolist(),
            "sink_logit_gap": self.sink_logit_gap.tolist(),
            "value_drain": (self.value_norm_bos / self.value_norm_rest).tolist(),
            "resid_peak_ratio": (self.resid_norm_bos / self.resid_norm_rest).tolist(),
            "backcopy_risk": self.backcopy_risk.tolist(),
            "bigram_risk": self.bigram_risk.tolist(),
        }


# Training


@toy_task(
    "bigram-backcopy",
    config=BigramBackcopyConfig,
    result=BigramBackcopyResult,
    paper="arXiv:2410.13835",
    version=3,
)
def train_bigram_backcopy(
    config: BigramBackcopyConfig,
    out_dir: Path,
    progress: Callable[[Progress], None] | None = None,
) -> BigramBackcopyResult:
    """Train a small transformer on Bigram-Backcopy and record how its attention sink grows.

    The folder then holds the model (``toy:DIR``), the run (see ``toy_tasks.training``) and
    ``sample.safetensors``, the held-out sequences. A run that was stopped goes on.

    Raises:
        TrainingError: The loss diverged, or the folder holds another run.
        WorkbenchError: An impossible law or a text that cannot be used; nothing is written.
    """
    law = make_law(read_counts(config.text), config.triggers)
    if config.text is not None:  # records must not tell where a folder lies
        config = replace(config, text=Path(config.text).name)
    model = make_model(config.model(law.d_vocab), config.seed).to(config.device)
    _claim(out_dir, config, law)
    sequences = sample(law, config.n_held_out, config.n_pos, _generator(config.seed))
    held_out = HeldOut.of(law, sequences)
    # Before the first step: who watches the run looks at its patterns on them.
    write_safetensors({"tokens": held_out.tokens}, out_dir / "sample.safetensors", {})
    train(
        model,
        make_loss(law, config),
        config.training(),
        out_dir,
        measure=lambda trained: headline(observe(_as_toy(trained), held_out)),
        progress=progress,
    )
    write_safetensors(weights_of(model), out_dir / "model.safetensors", {"format": "pt"})
    arrays, labels = measure_checkpoints(config, held_out, out_dir)
    return BigramBackcopyResult(
        **arrays,
        labels=labels | {"token": law.tokens},
        sample_tokens=sequences,
        triggers=law.triggers,
        unigram=law.unigram.float(),
        transition=law.transition.float(),
        config=config,
    )


def make_loss(
    law: BigramLaw, config: BigramBackcopyConfig
) -> Callable[[nn.Module, int, torch.Generator], Float[Tensor, ""]]:
    """Mean cross entropy at all positions of a fresh batch; ``Batches`` draws it, not the generator."""
    limit = DIVERGED * guessing_risk(law)
    batches = Batches(law, (config.batch_size, config.n_pos), (config.seed,), config.device)

    def loss_at(model: nn.Module, step: int, _generator: torch.Generator) -> Float[Tensor, ""]:
        batch = batches.at(step)[0]
        logits = model(batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if loss.item() > limit:
            raise TrainingError(
                f"the loss must stay below {limit:.0f} nats, {DIVERGED:.0f} times that of guessing; "
                f"at step {step} it is {loss.item():.3g}. Earlier checkpoints are kept; train again "
                "in a new folder with a lower lr."
            )
        return loss

    return loss_at


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(HELD_OUT_SEED + seed)


def _as_toy(model: nn.Module) -> ToyModel:
    assert isinstance(model, ToyModel)
    return model


def _claim(out_dir: Path, config: BigramBackcopyConfig, law: BigramLaw) -> None:
    """Write config.json; refuse a folder whose run was another one."""
    path = out_dir / "config.json"
    described: dict[str, Any] = {
        **describe_model(config.model(law.d_vocab)),
        "toy": "bigram-backcopy",
        "tokens": list(law.tokens),
        "run": asdict(config),
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        # A run may be lengthened: the learning rate does not depend on its length.
        changed = [
            name
            for name, value in described["run"].items()
            if name != "steps" and before.get("run", {}).get(name) != value
        ]
        if changed or before.get("tokens") != described["tokens"]:
            raise TrainingError(
                f"a run is resumed with the settings it began with; {path} has another "
                f"{changed[0] if changed else 'text'}. Set it so, or choose another folder."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
