"""State-space toy: what the sign of S_C^T S_B and the order of tokens do to a selective model.

Layers are those of the theory, without gate, convolution, norm or output projection:

    x_l <- x_l + C_l . h_l,   h_l = exp(-a Delta_l) h_{l-1} + Delta_l B_l x_l

(behind an output projection, a layer with all signs turned is the same function). A sequence is noise
with one signal token in its first half; the class of the signal is read from the last token. Five
variants start from the same weights and see the same batches: free; positive, negative and mixed, by
``exclude_regime``; reordered, the first layer behind a soft sort by importance.

Paper: Vo et al. 2025, "Demystifying the Token Dynamics of Deep Selective State Space Models",
arXiv:2410.03292. Their runs are WikiText-103 and ImageNet; the task here is ours.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.training import (
    Progress,
    TrainingError,
    batch_generator,
    deferred_interrupt,
    read_safetensors,
    write_safetensors,
)
from workbench.models.selective import ImportanceOrder, exclude_regime, scan_of, time_steps
from workbench.registry import toy_task
from workbench.settings import check_settings, setting

VARIANTS = ("free", "positive", "negative", "mixed", "reordered")
N_TEST = 512
FIRST_DELTA = 0.02
"""Time step at the start: softplus of the bias."""

# Settings and result


@dataclass(frozen=True)
class StateSpaceConfig:
    """Sizes and training of the five variants."""

    n_layers: int = setting(2, "layers of the stack", low=1)
    d_model: int = setting(16, "numbers a token", low=2)
    d_state: int = setting(4, "states a channel, eigenvalues a layer", low=1)
    n_pos: int = setting(16, "tokens of a sequence", low=2, unit="tokens")
    n_classes: int = setting(8, "signal tokens, one a class", low=2)
    n_noise: int = setting(24, "noise tokens", low=1)
    batch_size: int = setting(64, "sequences an update", low=1)
    steps: int = setting(100, "updates of each variant", low=1)
    record_every: int = setting(10, "updates between two records", low=1)
    lr: float = setting(0.01, "learning rate of Adam", low=0.0, exclusive=True)
    tau: float = setting(1.0, "temperature of the soft sort", low=0.0, exclusive=True)
    seed: int = setting(0, "of weights and sequences", low=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.d_state > self.d_model:
            raise TrainingError(
                f"d_state must be at most d_model, or P1 has no full rank; got {self.d_state} and "
                f"{self.d_model}; lower d_state"
            )


@dataclass(frozen=True)
class StateSpaceToyResult:
    """Training records of the variants, in the order of VARIANTS."""

    step: Int[Tensor, " checkpoint"]
    """Updates done."""
    loss: Float[Tensor, "variant checkpoint"]
    """On fixed sequences, nats; ln n_classes is guessing."""
    accuracy: Float[Tensor, "variant checkpoint"]
    """On the same sequences, in [0, 1]."""
    token_norm: Float[Tensor, "variant checkpoint depth"]
    """Mean token norm at the entry and after each layer."""
    positive_share: Float[Tensor, "variant checkpoint"]
    """Share of eigenvalues of S_B S_C^T with a positive real part."""
    config: StateSpaceConfig = field(default_factory=StateSpaceConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"variant": VARIANTS})

    def learnt_at(self, variant: int, accuracy: float = 0.5) -> float:
        """The first recorded step at which a variant is so accurate; infinite: never."""
        reached = (self.accuracy[variant] >= accuracy).nonzero()
        return float(self.step[reached[0, 0]]) if len(reached) else float("inf")

    def metrics(self) -> dict[str, float]:
        """The end of every variant, and when it had learnt half."""
        found = {}
        for row, name in enumerate(VARIANTS):
            found[f"loss_{name}"] = self.loss[row, -1].item()
            found[f"accuracy_{name}"] = self.accuracy[row, -1].item()
            found[f"half_learnt_{name}"] = self.learnt_at(row)
        return found | {"n_steps": float(self.step[-1]), "n_test": float(N_TEST)}

    def table(self) -> dict[str, list[str] | list[float]]:
        """One row a variant."""
        return {
            "variant": list(VARIANTS),
            "loss": self.loss[:, -1].tolist(),
            "accuracy": self.accuracy[:, -1].tolist(),
            "positive_share": self.positive_share[:, -1].tolist(),
            "norm_growth": (self.token_norm[:, -1, -1] / self.token_norm[:, -1, 0]).tolist(),
        }


# Data and model


def draw_sequences(
    config: StateSpaceConfig, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Noise with one signal token in the first half, and the signal's class."""
    tokens = torch.randint(config.n_noise, (n, config.n_pos), generator=generator)
    label = torch.randint(config.n_classes, (n,), generator=generator)
    place = torch.randint(max(config.n_pos // 2, 1), (n,), generator=generator)
    tokens[torch.arange(n), place] = config.n_noise + label
    return tokens, label


class SelectiveLayer(nn.Module):
    """One layer of the theory; its parameters are called as in a Mamba mixer."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.ssm_state_size, self.intermediate_size = d_state, d_model
        self.time_step_rank = max(d_model // 4, 1)
        self.x_proj = nn.Linear(d_model, self.time_step_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, d_model)
        self.A_log = nn.Parameter(torch.zeros(d_model, d_state))
        with torch.no_grad():
            self.dt_proj.bias.fill_(torch.tensor(FIRST_DELTA).expm1().log().item())

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], order: nn.Module | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Add the scan, on sorted tokens if an order is given."""
        if order is not None:
            x = order(time_steps(self, x)) @ x
        return x + scan_of(self, x)


class SelectiveStack(nn.Module):
    """Embedding, selective layers, and a linear reading of the last token."""

    def __init__(self, config: StateSpaceConfig, variant: str) -> None:
        super().__init__()
        sizes = config.d_model, config.d_state
        self.embed = nn.Embedding(config.n_noise + config.n_classes, config.d_model)
        self.layers = nn.ModuleList(SelectiveLayer(*sizes) for _ in range(config.n_layers))
        self.head = nn.Linear(config.d_model, config.n_classes)
        nn.init.normal_(self.embed.weight, std=config.d_model**-0.5)
        # Last, so that the other weights are the same in every variant.
        self.order = ImportanceOrder(config.d_model, config.tau) if variant == "reordered" else None
        if variant in ("positive", "negative", "mixed"):
            exclude_regime(self, variant)

    def forward(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch n_classes"], list[Tensor]]:
        """Class logits, and the tokens at the entry and after each layer."""
        seen = [self.embed(tokens)]
        for index, layer in enumerate(self.layers):
            seen.append(layer(seen[-1], self.order if index == 0 else None))
        return self.head(seen[-1][:, -1]), seen


def positive_share(model: SelectiveStack) -> float:
    """Share of eigenvalues of S_B S_C^T with a positive real part."""
    values = []
    layers: list[Any] = list(model.layers)
    for layer in layers:
        n = layer.ssm_state_size
        _, b, c = layer.x_proj.weight.detach().split([layer.time_step_rank, n, n])
        values.append(torch.linalg.eigvals(b.double() @ c.double().T).real > 0)
    return torch.cat(values).double().mean().item()


# Training


@toy_task(
    "state-space", config=StateSpaceConfig, result=StateSpaceToyResult, paper="arXiv:2410.03292"
)
def train_state_space(
    config: StateSpaceConfig, out_dir: Path, progress: Callable[[Progress], None] | None = None
) -> StateSpaceToyResult:
    """Train a selective stack with and without the refinements on one recall task.

    A stopped run goes on with the variants that are missing: each is written when it is done.

    Raises:
        TrainingError: a loss became infinite, or the folder holds a run of other settings.
        KeyboardInterrupt: after Ctrl-C.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    records = []
    with deferred_interrupt() as interrupted:
        for index, variant in enumerate(VARIANTS):

            def tell(step: int, loss: float, index: int = index, variant: str = variant) -> None:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                done, whole = index * config.steps + step, len(VARIANTS) * config.steps
                left = (time.monotonic() - started) / max(done, 1) * (whole - done)
                if progress:
                    progress(Progress(done, whole, {f"loss_{variant}": loss}, left))

            records.append(_kept_or_trained(config, variant, out_dir, tell))
    _save_model(config, out_dir)
    arrays = {name: torch.stack([record[name] for record in records]) for name in records[0]}
    return StateSpaceToyResult(
        arrays["step"][0].long(),
        arrays["loss"],
        arrays["accuracy"],
        arrays["token_norm"],
        arrays["positive_share"],
        config,
    )


def _kept_or_trained(
    config: StateSpaceConfig, variant: str, out_dir: Path, tell: Callable[[int, float], None]
) -> dict[str, Tensor]:
    path, settings = out_dir / f"{variant}.safetensors", json.dumps(asdict(config))
    if path.is_file():
        tensors, metadata = read_safetensors(path)
        if metadata.get("settings") != settings:
            raise TrainingError(
                f"a run is resumed with the settings it began with; {path} was made with "
                f"{metadata.get('settings')}; set them so, or choose another folder"
            )
        return {name[7:]: x for name, x in tensors.items() if name.startswith("record.")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = SelectiveStack(config, variant)
    record = _train_variant(config, model, tell)
    kept = {f"record.{name}": x for name, x in record.items()}
    write_safetensors(kept | model.state_dict(), path, {"settings": settings})
    return record


def _train_variant(
    config: StateSpaceConfig, model: SelectiveStack, tell: Callable[[int, float], None]
) -> dict[str, Tensor]:
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr)
    test = draw_sequences(config, N_TEST, torch.Generator().manual_seed(config.seed + 1))
    rows: list[dict[str, Tensor]] = []
    for step in range(config.steps + 1):
        if step % config.record_every == 0 or step == config.steps:
            rows.append(_measure(model, *test) | {"step": torch.tensor(float(step))})
            tell(step, rows[-1]["loss"].item())
        if step < config.steps:
            tokens, label = draw_sequences(
                config, config.batch_size, batch_generator(config.seed, step)
            )
            loss = nn.functional.cross_entropy(model(tokens)[0], label)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss must stay finite; at step {step} it is {loss.item()}; train again "
                    "with a lower lr"
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def _measure(
    model: SelectiveStack, tokens: Int[Tensor, "batch pos"], label: Int[Tensor, " batch"]
) -> dict[str, Tensor]:
    logits, seen = model(tokens)
    return {
        "loss": nn.functional.cross_entropy(logits, label),
        "accuracy": (logits.argmax(dim=-1) == label).float().mean(),
        "token_norm": torch.stack([x.norm(dim=-1).mean() for x in seen]),
        "positive_share": torch.tensor(positive_share(model)),
    }


def _save_model(config: StateSpaceConfig, out_dir: Path) -> None:
    weights: dict[str, Tensor] = {}
    for variant in VARIANTS:
        tensors, _ = read_safetensors(out_dir / f"{variant}.safetensors")
        own = {name: x for name, x in tensors.items() if not name.startswith("record.")}
        weights |= {f"{variant}.{name}": x for name, x in own.items()}
    write_safetensors(weights, out_dir / "model.safetensors", {"format": "pt"})
    described = json.dumps({"model_type": "state-space"} | asdict(config), indent=1)
    (out_dir / "config.json").write_text(described + "\n", encoding="utf-8")
