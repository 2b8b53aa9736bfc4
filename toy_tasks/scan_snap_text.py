"""Scan and snap on text: an ordinary transformer, trained by SGD, whose attention grows sparse.

The third experiment of the paper: a transformer of one or three layers in ordinary parameters, no
free matrices Y and Z, learns to predict the next word of a text. Along training, on held-out text,
of every layer's attention A (queries from the middle of a prompt on, n keys visible):

    entropy          -sum A ln A over ln n: 1 even, 0 on one token
    top attention    the largest weight of a row
    change           half the sum of |A - A before|, against half as many steps: 0 frozen, 1 moved
    on common words  attention on the most frequent words over their share of the visible words

Sparse: entropy falls and the top rises. Freezing: the change from one doubling of the steps to the
next falls. Checkpoints are on a log scale, so that attention that drifts on shows.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380, Fig. 7: WikiText2, SGD with learning
rate 5. Theirs is a larger model; sizes, text and clipping are ours (unclipped, a rate of 5 diverges here).
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.model import ToyModel, ToyModelConfig, describe_model, make_model
from toy_tasks.scan_snap_words import Words, prompts, read_words
from toy_tasks.training import (
    Progress,
    TrainingConfig,
    TrainingError,
    checkpoint_steps,
    load_weights,
    train,
    weights_of,
    write_safetensors,
)
from workbench.models.base import Site
from workbench.registry import toy_task
from workbench.settings import check_settings, setting

COMMON = 20  # of the most frequent words


@dataclass(frozen=True)
class ScanSnapTextConfig:
    """A run; one core trains the defaults in about a minute."""

    n_layers: int = setting(1, "blocks (paper: 1 and 3)", low=1, high=12)
    n_heads: int = setting(1, "heads of a block", low=1)
    d_model: int = setting(32, "width of the residual stream", low=2)
    n_pos: int = setting(16, "words of a prompt", low=4, unit="words")
    batch_size: int = setting(16, "prompts of a step", low=1)
    lr: float = setting(5.0, "learning rate of plain SGD", low=0.0, exclusive=True)
    grad_clip: float = setting(0.1, "largest norm of the gradient", low=0.0, exclusive=True)
    steps: int = setting(2048, "updates", low=1)
    seed: int = setting(0, "of weights and batches", low=0)
    n_words: int = setting(200, "words that are told apart, the most frequent", low=10)
    text: str | None = setting(None, "a text file; none: the builtin prose")
    n_held_out: int = setting(32, "held-out prompts that are measured", low=1)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)

    def model(self, d_vocab: int) -> ToyModelConfig:
        """The model's part."""
        return ToyModelConfig(
            d_vocab=d_vocab,
            n_ctx=self.n_pos,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            d_mlp=4 * self.d_model,
        )

    def training(self) -> TrainingConfig:
        """The training loop's part: no momentum, no decay."""
        return TrainingConfig(
            n_steps=self.steps,
            lr=self.lr,
            warmup_steps=0,
            decay_share=0.0,
            optimizer="sgd",
            beta1=0.0,
            weight_decay=0.0,
            grad_clip=self.grad_clip,
            seed=self.seed,
            checkpoints_per_doubling=1.0,
            report_every=50,
        )


@dataclass(frozen=True)
class ScanSnapTextResult:
    """One run, measured at every doubling of its steps and at its end."""

    step: Int[Tensor, " checkpoint"]
    """Updates done; the last is the end."""
    loss: Float[Tensor, " checkpoint"]
    """On held-out prompts, nats a word."""
    train_loss: Float[Tensor, " checkpoint"]
    """On as many prompts of the training text."""
    entropy: Float[Tensor, "checkpoint layer"]
    """Over that of even attention, in [0, 1]; mean over prompts, heads and later queries."""
    top_attention: Float[Tensor, "checkpoint layer"]
    """Mean largest weight of a row."""
    change: Float[Tensor, "checkpoint layer"]
    """Mean total variation distance from the checkpoint before, in [0, 1]; NaN at the first."""
    common_ratio: Float[Tensor, "checkpoint layer"]
    """Attention on common words over their share of the visible words; below 1: avoided."""
    data_digest: Int[Tensor, " byte"]
    """SHA-256 of the text's tokens."""
    config: ScanSnapTextConfig = field(default_factory=ScanSnapTextConfig)

    def data_hash(self) -> str:
        """Hash of the text, which the settings do not tell whole."""
        return bytes(self.data_digest.tolist()).hex()

    def metrics(self) -> dict[str, float]:
        """The first layer at the end, beside its beginning."""
        return {
            "loss": self.loss[-1].item(),
            "train_loss": self.train_loss[-1].item(),
            "first_loss": self.loss[0].item(),
            "entropy": self.entropy[-1, 0].item(),
            "first_entropy": self.entropy[0, 0].item(),
            "top_attention": self.top_attention[-1, 0].item(),
            "first_top_attention": self.top_attention[0, 0].item(),
            "peak_change": self.change[1:, 0].max().item(),
            "last_change": self.change[-1, 0].item(),
            "common_ratio": self.common_ratio[-1, 0].item(),
            "n_steps": float(self.step[-1]),
        }

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a checkpoint, of the first layer."""
        return {
            "step": self.step.tolist(),
            "loss": self.loss.tolist(),
            "train_loss": self.train_loss.tolist(),
            "entropy": self.entropy[:, 0].tolist(),
            "top_attention": self.top_attention[:, 0].tolist(),
            "change": self.change[:, 0].tolist(),
            "common_ratio": self.common_ratio[:, 0].tolist(),
        }


# Mathematics


def row_entropy(pattern: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch query"]:
    """Entropy of every row over the log of its visible keys; of row 0, which sees one key, 0."""
    n_visible = torch.arange(1, pattern.shape[-1] + 1)
    return torch.special.entr(pattern).sum(dim=-1) / n_visible.log().clamp(min=1e-9)


def common_ratio(
    pattern: Float[Tensor, "row head query key"], is_common: Float[Tensor, "row key"]
) -> float:
    """Attention on common keys over their share of the visible keys; means over all rows."""
    n_pos = pattern.shape[-1]
    even = torch.ones(n_pos, n_pos).tril() / torch.arange(1, n_pos + 1)[:, None]
    later = slice(n_pos // 2, None)
    on_common = torch.einsum("rhqk,rk->rhq", pattern, is_common)[..., later].mean()
    share = torch.einsum("qk,rk->rq", even, is_common)[..., later].mean()
    return (on_common / share.clamp(min=1e-9)).item()


# Training


@toy_task(
    "scan-snap-text",
    config=ScanSnapTextConfig,
    result=ScanSnapTextResult,
    paper="arXiv:2305.16380",
)
def train_scan_snap_text(
    config: ScanSnapTextConfig,
    out_dir: Path,
    progress: Callable[[Progress], None] | None = None,
) -> ScanSnapTextResult:
    """Train a transformer on text with SGD and record how its attention sparsifies and freezes.

    The folder then holds the model (``toy:DIR``), the run (see ``toy_tasks.training``) and
    ``sample.safetensors``, the held-out prompts. A run that was stopped goes on.

    Raises:
        TrainingError: The loss diverged, or the folder holds another run.
        DataError: The text cannot be used.
    """
    words = read_words(config.text, config.n_words, config.n_pos)
    if config.text is not None:  # records must not tell where a folder lies
        config = replace(config, text=Path(config.text).name)
    d_vocab = len(words.vocabulary)
    model = make_model(config.model(d_vocab), config.seed)
    _claim(out_dir, config, words)

    def loss_at(model: nn.Module, step: int, generator: torch.Generator) -> Float[Tensor, ""]:
        return _loss(model, prompts(words.train, config.batch_size, config.n_pos, generator))

    held_out = prompts(
        words.held_out, config.n_held_out, config.n_pos, torch.Generator().manual_seed(0)
    )
    # Before the first step: who watches the run looks at its patterns on them.
    write_safetensors({"tokens": held_out[:, :-1]}, out_dir / "sample.safetensors", {})
    train(model, loss_at, config.training(), out_dir, progress=progress)
    write_safetensors(weights_of(model), out_dir / "model.safetensors", {"format": "pt"})
    seen = prompts(words.train, config.n_held_out, config.n_pos, torch.Generator().manual_seed(0))
    return _measured(config, words, (held_out, seen), out_dir)


def _loss(model: nn.Module, rows: Int[Tensor, "row longer"]) -> Float[Tensor, ""]:
    logits = model(rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _claim(out_dir: Path, config: ScanSnapTextConfig, words: Words) -> None:
    """Write config.json; refuse a folder whose run was another one."""
    path = out_dir / "config.json"
    described = {
        **describe_model(config.model(len(words.vocabulary))),
        "toy": "scan-snap-text",
        "tokens": list(words.vocabulary),
        "text_hash": words.digest().hex(),
        "run": asdict(config),
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = {**before, "run": {**before.get("run", {}), "steps": config.steps}}
        if same != described:
            raise TrainingError(
                f"a run is resumed with the settings and the text it began with; {path} has others. "
                "Set them so, or choose another folder."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


# The record


def _measured(
    config: ScanSnapTextConfig, words: Words, rows: tuple[Tensor, Tensor], out_dir: Path
) -> ScanSnapTextResult:
    """Measure every checkpoint on held-out rows, its loss also on rows of the training text."""
    held_out, seen = rows
    steps = checkpoint_steps(config.training())
    model = make_model(config.model(len(words.vocabulary)), config.seed)
    found: list[tuple[float, list[Tensor]]] = []
    train_loss = []
    for step in steps:
        load_weights(model, out_dir / "checkpoints" / f"step_{step:08d}.safetensors")
        found.append(_observe(model, held_out))
        train_loss.append(_observe(model, seen)[0])
    # 0 stands for all rare words together, and is not a common one.
    is_common = ((held_out[:, :-1] > 0) & (held_out[:, :-1] <= COMMON)).float()
    later = slice(config.n_pos // 2, None)
    patterns = [torch.stack(layers)[..., later, :] for _, layers in found]
    moved = [
        (now - before).abs().sum(dim=-1).mean(dim=(1, 2, 3)) / 2
        for before, now in itertools.pairwise(patterns)
    ]
    by_layer = [
        [
            (row_entropy(layer)[..., later].mean().item(), common_ratio(layer, is_common))
            for layer in layers
        ]
        for _, layers in found
    ]
    entropy, ratio = torch.tensor(by_layer).permute(2, 0, 1)
    return ScanSnapTextResult(
        torch.tensor(steps),
        torch.tensor([loss for loss, _ in found]),
        torch.tensor(train_loss),
        entropy.contiguous(),
        torch.stack([pattern.amax(dim=-1).mean(dim=(1, 2, 3)) for pattern in patterns]),
        torch.stack([torch.full((config.n_layers,), torch.nan), *moved]),
        ratio.contiguous(),
        torch.tensor(list(words.digest())),
        config,
    )


def _observe(model: ToyModel, held_out: Int[Tensor, "row longer"]) -> tuple[float, list[Tensor]]:
    """Loss, and the pattern of every layer."""
    seen: list[Tensor] = []

    def keep(site: Site, x: Tensor) -> Tensor:
        if site.name == "pattern":
            seen.append(x)
        return x

    with torch.no_grad():
        logits = model(held_out[:, :-1], tap=keep).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    return loss.item(), seen
