"""Bigram-Backcopy: a small transformer grows an attention sink, step by step on record.

Sequences follow a bigram law, except that after a trigger the character before it is copied (see
``toy_tasks.bigram_law``). Attention is needed after triggers only; on all other queries the head
is dormant and parks its attention on <s>, whose value is drained so that it does no harm. Sink
logit, value drain and (in deeper models) residual peak grow together: "mutual reinforcement".

Along training, on a log schedule, every checkpoint is measured (``toy_tasks.bigram_measure``)
and measured again under ablations: attention or MLP of a block skipped, a head zeroed, a head's
attention moved to <s>.

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835. Defaults are a size
that trains in half a minute on one core, where they take d_model 256, 256 positions, batches of
512, lr 3e-4 and 10000 steps. Risks leave out position 0, where their oracle is not the true law.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.bigram_law import BigramLaw, guessing_risk, make_law, read_counts, sample
from toy_tasks.bigram_measure import (
    HeldOut,
    Observed,
    ablations,
    ask_ablated,
    observe,
    over_rest,
)
from toy_tasks.model import (
    BIASES,
    KERNELS,
    ToyModel,
    ToyModelConfig,
    describe_model,
    make_model,
)
from toy_tasks.training import (
    Figures,
    Progress,
    TrainingConfig,
    TrainingError,
    checkpoint_steps,
    load_weights,
    train,
    weights_of,
    write_safetensors,
)
from workbench.registry import toy_task
from workbench.settings import check_settings, setting

HELD_OUT_SEED = 2**40
"""Far from every training step's seed."""
DIVERGED = 10.0
"""A loss this many times that of guessing is no learning any more; random weights have 1."""


@dataclass(frozen=True)
class BigramBackcopyConfig:
    """A run; see the module's docstring for the paper's sizes."""

    n_layers: int = setting(1, "blocks (paper: 1 and 3)", low=1, high=12)
    n_heads: int = setting(1, "heads of a block", low=1)
    d_model: int = setting(64, "width of the residual stream", low=2)
    n_pos: int = setting(64, "tokens that the model reads, <s> included", low=4)
    batch_size: int = setting(32, "sequences of one step", low=1)
    lr: float = setting(3e-3, "learning rate, without warm-up or decay", low=0.0, exclusive=True)
    steps: int = setting(700, "updates", low=1)
    seed: int = setting(0, "of weights, batches and held-out sequences", low=0)
    attention: str = setting("softmax", "kernel of the attention", choices=tuple(KERNELS))
    row_sum: float = setting(1.0, "sum of a row of softmax-scale", low=0.0, exclusive=True)
    bias: str = setting("none", "what a head can attend to besides tokens", choices=BIASES)
    norm: str = setting("pre", "where the norms stand", choices=("pre", "post"))
    positions: str = setting(
        "learned", "how positions enter", choices=("learned", "rotary", "none")
    )
    mlp: bool = setting(True, "an MLP of four times the width in every block")
    optimizer: str = setting("adamw", "method of descent", choices=("adamw", "adam", "sgd"))
    momentum: float = setting(0.9, "beta1, or the momentum of sgd", low=0.0, high=1.0)
    weight_decay: float = setting(1e-4, "pull to zero of matrices", low=0.0)
    triggers: int | str = setting(
        3, "how many of the most frequent characters are triggers, or the characters themselves"
    )
    text: str | None = setting(None, "a text file whose characters are imitated; none: the paper's")
    n_held_out: int = setting(64, "held-out sequences that are measured", low=1)
    checkpoints_per_doubling: float = setting(
        2.0, "checkpoints kept while the step doubles", low=0.0, exclusive=True
    )
    device: str = setting("cpu", "where it trains", choices=("cpu", "cuda"))

    def __post_init__(self) -> None:
        check_settings(self)

    def model(self, d_vocab: int) -> ToyModelConfig:
        """The model's part."""
        return ToyModelConfig(
            d_vocab=d_vocab,
            n_ctx=self.n_pos,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            d_mlp=4 * self.d_model if self.mlp else 0,
            norm=self.norm,
            positions=self.positions,
            attention=self.attention,
            row_sum=self.row_sum,
            bias=self.bias,
        )

    def training(self) -> TrainingConfig:
        """The training loop's part: a constant learning rate, and no clipping, as in the paper."""
        return TrainingConfig(
            n_steps=self.steps,
            lr=self.lr,
            warmup_steps=0,
            decay_share=0.0,
            optimizer=self.optimizer,
            beta1=self.momentum,
            weight_decay=self.weight_decay,
            grad_clip=1e12,
            seed=self.seed,
            checkpoints_per_doubling=self.checkpoints_per_doubling,
            report_every=50,
        )


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
    """Residual norm of <s> over that of the rest, at the same depth."""
    sink_attention_by_head: Float[Tensor, "checkpoint layer head"]
    sink_logit_gap_by_head: Float[Tensor, "checkpoint layer head"]
    sink_logit_gap_by_token: Float[Tensor, "checkpoint d_vocab"]
    """By the query's token; NaN for triggers and tokens that do not occur."""
    sink_logit_std: Float[Tensor, " checkpoint"]
    """Over queries, of the score at <s>."""
    other_logit_std: Float[Tensor, " checkpoint"]
    """Over queries and keys, of the other scores."""
    bias_attention: Float[Tensor, " checkpoint"]
    """Attention to a learned key; 0 without one."""
    resid_norm_bos_by_depth: Float[Tensor, "checkpoint depth"]
    resid_norm_rest_by_depth: Float[Tensor, "checkpoint depth"]
    sample_tokens: Int[Tensor, "row longer"]
    """The held-out sequences."""
    triggers: Int[Tensor, " trigger"]
    unigram: Float[Tensor, " d_vocab"]
    transition: Float[Tensor, "d_vocab next_token"]
    """The row of <s> is the law of the first character."""
    labels: dict[str, tuple[str, ...]]
    config: BigramBackcopyConfig = field(default_factory=BigramBackcopyConfig)

    def without_attention(self, risk: Float[Tensor, "ablation checkpoint"]) -> float:
        """The largest final risk with one block's attention skipped."""
        rows = [name.startswith("no_attention") for name in self.labels["ablation"]]
        return risk[torch.tensor(rows), -1].max().item()

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
    train(
        model,
        make_loss(law, config),
        config.training(),
        out_dir,
        measure=lambda trained: _headline(observe(_as_toy(trained), held_out)),
        progress=progress,
    )
    write_safetensors(weights_of(model), out_dir / "model.safetensors", {"format": "pt"})
    write_safetensors({"tokens": held_out.tokens}, out_dir / "sample.safetensors", {})
    return measure_run(config, held_out, sequences, out_dir)


def make_loss(
    law: BigramLaw, config: BigramBackcopyConfig
) -> Callable[[nn.Module, int, torch.Generator], Float[Tensor, ""]]:
    """Mean cross entropy at all positions of a fresh batch."""
    limit = DIVERGED * guessing_risk(law)

    def loss_at(model: nn.Module, step: int, generator: torch.Generator) -> Float[Tensor, ""]:
        batch = sample(law, config.batch_size, config.n_pos, generator).to(config.device)
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


# The record


def _headline(found: Observed) -> Figures:
    """The figures that are noted while it trains."""
    value, rest = over_rest(found.ov_norm).tolist()
    peaks = over_rest(found.resid_norm)
    return {
        "sink_attention": found.sink_attention.mean().item(),
        "sink_logit_gap": found.sink_logit_gap.mean().item(),
        "value_drain": value / rest if rest else math.nan,
        "resid_peak_ratio": (peaks[0] / peaks[1]).max().item(),
        "backcopy_risk": found.backcopy_risk,
        "bigram_risk": found.bigram_risk,
    }


def measure_run(
    config: BigramBackcopyConfig,
    held_out: HeldOut,
    sequences: Int[Tensor, "row longer"],
    out_dir: Path,
) -> BigramBackcopyResult:
    """Measure every checkpoint of a finished run from its weights."""
    law = held_out.law
    steps = checkpoint_steps(config.training())
    model = make_model(config.model(law.d_vocab), config.seed).to(config.device)
    models = [_checkpoint(model, out_dir, step) for step in reversed(steps)]
    observed: list[Observed] = []
    ablated: list[list[tuple[float, float, float]]] = []
    names = tuple(name for name, _ in ablations(model))
    depth = 0
    # From the last to the first: the last decides at which depth residual norms are compared.
    for load in models:
        found = observe(load(), held_out)
        if not observed:
            depth = _peak_depth(found)
        observed.insert(0, found)
        ablated.insert(0, [ask_ablated(model, held_out, tap, depth) for _, tap in ablations(model)])
    return BigramBackcopyResult(
        step=torch.tensor(steps),
        **_series(observed, depth),
        **_ablated_series(ablated),
        sample_tokens=sequences,
        triggers=law.triggers,
        unigram=law.unigram.float(),
        transition=law.transition.float(),
        labels={"ablation": names},
        config=config,
    )


def _checkpoint(model: ToyModel, out_dir: Path, step: int) -> Callable[[], ToyModel]:
    def load() -> ToyModel:
        load_weights(model, out_dir / "checkpoints" / f"step_{step:08d}.safetensors")
        return model

    return load


def _peak_depth(found: Observed) -> int:
    bos, rest = over_rest(found.resid_norm)
    return int((bos / rest).argmax())


def _series(observed: list[Observed], depth: int) -> dict[str, Tensor]:
    value = torch.stack([over_rest(found.ov_norm) for found in observed])
    resid = torch.stack([over_rest(found.resid_norm) for found in observed])
    sink = torch.stack([found.sink_attention for found in observed])
    gap = torch.stack([found.sink_logit_gap for found in observed])
    numbers = (
        "backcopy_risk",
        "bigram_risk",
        "sink_logit_std",
        "other_logit_std",
        "bias_attention",
    )
    return {
        "sink_attention": sink.mean(dim=(1, 2)),
        "sink_logit_gap": gap.mean(dim=(1, 2)),
        "value_norm_bos": value[:, 0],
        "value_norm_rest": value[:, 1],
        "resid_norm_bos": resid[:, 0, depth],
        "resid_norm_rest": resid[:, 1, depth],
        "sink_attention_by_head": sink,
        "sink_logit_gap_by_head": gap,
        "sink_logit_gap_by_token": torch.stack([found.gap_by_token for found in observed]),
        "resid_norm_bos_by_depth": resid[:, 0],
        "resid_norm_rest_by_depth": resid[:, 1],
        **{name: torch.tensor([getattr(found, name) for found in observed]) for name in numbers},
    }


def _ablated_series(ablated: list[list[tuple[float, float, float]]]) -> dict[str, Tensor]:
    backcopy, bigram, peak = torch.tensor(ablated).permute(2, 1, 0)
    return {
        "backcopy_risk_ablated": backcopy.contiguous(),
        "bigram_risk_ablated": bigram.contiguous(),
        "resid_peak_ablated": peak.contiguous(),
    }
