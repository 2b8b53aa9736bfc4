"""Many Bigram-Backcopy runs as one: the same settings from many seeds, a leading axis of weights.

A small model leaves a processor waiting for the next small operation; here every operation works
on all seeds at once (``torch.func``: the modules' weights are stacked, the loss is mapped over
them). Seed s has the first weights, the batches and the held-out sequences of a run with
``seed=s``, and ends where that run ends, up to rounding.

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from toy_tasks.bigram_backcopy import DIVERGED, HELD_OUT_SEED, BigramBackcopyConfig
from toy_tasks.bigram_batches import Batches
from toy_tasks.bigram_law import BigramLaw, guessing_risk, make_law, read_counts, sample
from toy_tasks.bigram_measure import HeldOut, observe, over_rest
from toy_tasks.model import ToyModel, make_model
from workbench.errors import ConfigError
from workbench.models.base import Site

WIDEST, WIDEST_CUDA = 2**20, 2**28
"""Numbers in the widest activation of a pass. Measured on one core: 50 models of width 16 gain a
factor of five together; from half a million numbers a model on, nothing is gained any more."""
MEASURED = ("sink_attention", "sink_logit_gap", "value_drain", "backcopy_risk", "bigram_risk")
"""On held-out sequences, at the end."""
Stacked = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class BigramSeeds:
    """Where the run of every seed ended."""

    seeds: tuple[int, ...]
    loss: Float[Tensor, "step seed"]
    """Of every step's batch before its update, in nats."""
    diverged_at: Int[Tensor, " seed"]
    """The first step whose loss was ten times that of guessing, or no number; -1: none."""
    sink_attention: Float[Tensor, " seed"]
    """Mean over layers and heads, on held-out sequences; NaN where the run diverged, as below."""
    sink_logit_gap: Float[Tensor, " seed"]
    value_drain: Float[Tensor, " seed"]
    """Value norm of <s> over its mean elsewhere."""
    backcopy_risk: Float[Tensor, " seed"]
    """Excess, in nats."""
    bigram_risk: Float[Tensor, " seed"]
    weights: dict[str, Tensor]
    """Of all models, by name, with a leading axis of seeds."""
    law: BigramLaw
    config: BigramBackcopyConfig = field(default_factory=BigramBackcopyConfig)

    def model(self, seed: int) -> ToyModel:
        """The trained model of one seed, for ``workbench.wrap`` and every probe.

        Raises:
            ConfigError: The seed was not trained.
        """
        if seed not in self.seeds:
            raise ConfigError(
                f"seed must be one that was trained, {min(self.seeds)} ... {max(self.seeds)}; got "
                f"{seed}"
            )
        model = make_model(self.config.model(self.law.d_vocab), seed)
        row = self.seeds.index(seed)
        model.load_state_dict({name: stack[row] for name, stack in self.weights.items()})
        return model

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a seed."""
        return {
            "seed": list(self.seeds),
            "loss": self.loss[-1].tolist(),
            "sink_attention": self.sink_attention.tolist(),
            "sink_logit_gap": self.sink_logit_gap.tolist(),
            "value_drain": self.value_drain.tolist(),
            "backcopy_risk": self.backcopy_risk.tolist(),
            "bigram_risk": self.bigram_risk.tolist(),
            "diverged_at": self.diverged_at.tolist(),
        }


def train_seeds(
    config: BigramBackcopyConfig,
    seeds: tuple[int, ...],
    progress: Callable[[int, int, float], None] | None = None,
) -> BigramSeeds:
    """Train one model a seed, all at once; ``seed`` of the config is not used.

    Args:
        config: Of every run.
        seeds: Distinct, at least one.
        progress: Told the step, the number of steps (of all groups of seeds) and the mean loss.

    Raises:
        ConfigError: No seed, or one twice. A run that diverges stops none of the others.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be distinct, not negative and at least one; got {seeds}")
    law = make_law(read_counts(config.text), config.triggers)
    size = seeds_at_once(config)
    groups = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    done = itertools.count(1)

    def tell(losses: Tensor) -> None:
        if progress:
            progress(next(done), len(groups) * config.steps, losses.nanmean().item())

    trained = [_train_group(config, law, group, tell) for group in groups]
    loss = torch.cat([losses for losses, _ in trained], dim=1)
    names = trained[0][1]
    weights = {name: torch.cat([stack[name] for _, stack in trained]) for name in names}
    return _finished(config, seeds, law, loss, weights)


def seeds_at_once(config: BigramBackcopyConfig) -> int:
    """How many seeds share one pass: as many as keep the widest activation in the cache."""
    widest = max(config.d_model * (4 if config.mlp else 1), config.n_heads * config.n_pos)
    limit = WIDEST_CUDA if config.device == "cuda" else WIDEST
    return max(1, limit // (config.batch_size * config.n_pos * widest))


def _train_group(
    config: BigramBackcopyConfig,
    law: BigramLaw,
    seeds: tuple[int, ...],
    tell: Callable[[Tensor], None],
) -> tuple[Float[Tensor, "step seed"], Stacked]:
    """Losses and last weights; ``tell`` hears the losses of every step."""
    models = [make_model(config.model(law.d_vocab), seed).to(config.device) for seed in seeds]
    weights, _ = stack_module_state(models)
    optimizer = _optimizer(weights, models[0], config)
    losses_of = make_losses(models[0])
    record = torch.zeros(config.steps, len(seeds))
    batches = Batches(law, (config.batch_size, config.n_pos), seeds, config.device)
    for step in range(config.steps):
        losses = losses_of(weights, batches.at(step))
        record[step] = losses.detach().cpu()
        optimizer.zero_grad()
        losses.sum().backward()  # a seed's loss depends on its own weights only
        optimizer.step()
        tell(record[step])
    return record, {name: weight.detach().cpu() for name, weight in weights.items()}


def make_losses(model: ToyModel) -> Callable[[Stacked, Tensor], Float[Tensor, " seed"]]:
    """Mean cross entropy of every seed's model on its own batch ``[seed row longer]``."""

    def loss_of(weights: Stacked, batch: Tensor) -> Tensor:
        logits = functional_call(model, weights, (batch[:, :-1],), {"tap": watch_nothing}).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return vmap(loss_of)


def watch_nothing(_site: Site, x: Tensor) -> Tensor:
    """A tap that has the pattern made: torch's one kernel for attention cannot be mapped over seeds."""
    return x


def _optimizer(
    weights: Stacked, model: ToyModel, config: BigramBackcopyConfig
) -> torch.optim.Optimizer:
    """That of the single run: no decay of gains and biases."""
    is_matrix = {name: weight.ndim >= 2 for name, weight in model.named_parameters()}
    groups = [
        {
            "params": [weights[name] for name in weights if is_matrix[name] == decays],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    adaptive = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    betas = (config.momentum, config.training().beta2)
    return adaptive(groups, lr=config.lr, betas=betas, fused=True)


# The end of the runs


def _finished(
    config: BigramBackcopyConfig,
    seeds: tuple[int, ...],
    law: BigramLaw,
    loss: Float[Tensor, "step seed"],
    weights: Stacked,
) -> BigramSeeds:
    diverged = _diverged_at(loss, DIVERGED * guessing_risk(law))
    model = make_model(config.model(law.d_vocab), 0)
    rows = []
    for index, seed in enumerate(seeds):
        if diverged[index] >= 0:
            rows.append([torch.nan] * len(MEASURED))
            continue
        model.load_state_dict({name: stack[index] for name, stack in weights.items()})
        rows.append(_measured(model, law, config, seed))
    found = dict(zip(MEASURED, torch.tensor(rows).T.contiguous(), strict=True))
    return BigramSeeds(seeds, loss, diverged, **found, weights=weights, law=law, config=config)


def _diverged_at(loss: Float[Tensor, "step seed"], limit: float) -> Int[Tensor, " seed"]:
    bad = ~(loss <= limit)
    return torch.where(bad.any(dim=0), bad.int().argmax(dim=0), -1)


def _measured(
    model: ToyModel, law: BigramLaw, config: BigramBackcopyConfig, seed: int
) -> list[float]:
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + seed)
    held_out = HeldOut.of(law, sample(law, config.n_held_out, config.n_pos, generator))
    found = observe(model, held_out)
    value, rest = over_rest(found.ov_norm).tolist()
    return [
        found.sink_attention.mean().item(),
        found.sink_logit_gap.mean().item(),
        value / rest if rest else float("nan"),
        found.backcopy_risk,
        found.bigram_risk,
    ]
