"""Active-dormant heads: heads that work on one kind of text and park on the first token elsewhere.

A head is dormant in a domain (a set of prompts) when it pays most of its attention to the first
token and is not missed there:

    sink attention > sink_threshold   and   ablation loss <= loss_threshold,

where sink attention is the mean of A[n, 0] over the queries n >= 2, and ablation loss is the loss
with the head's z zeroed minus the loss without, in nats per token. Heads are always active, always
dormant, or active-dormant: dormant in one domain and active in another. Two domains may get
different labels only where a permutation test over prompts shows that they differ (false-discovery
rate over heads); otherwise the head is judged by its mean over domains. Beside it, per head and
domain: sink-logit gap, value norm |v W_O| of the first token and its ratio to the others', loss
change when the head's attention is moved to the first token, row and column entropy; per domain and
depth the residual norm of the first token against the others; and how high the residual peak is with
one block's attention or MLP zeroed, which tells who makes it.

Every number of a domain is the mean over its prompts of each prompt's mean over its tokens.

Paper: Guo et al. 2024, "Active-Dormant Attention Heads", arXiv:2410.13835. They look at one head
and its means; thresholds, test and the head-by-head sweep are ours. Their means over queries contain
n = 0, where A is 1, and n = 1; ours do not.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.active_dormant_activity import PARTS
from probes.active_dormant_examples import Examples, choose_heads, read_examples
from probes.active_dormant_prompts import check_lengths, measure_prompts
from probes.active_dormant_statistics import (
    Domains,
    adjusted,
    check_prompts,
    choose_permutations,
    classes,
    domains_of,
    dormant_heads,
    judged,
    n_relabellings,
    permutation_p,
)
from workbench.context import Context
from workbench.models.base import ModelAdapter
from workbench.registry import probe
from workbench.settings import check_settings, setting

# Config and result


@dataclass(frozen=True)
class ActiveDormantConfig:
    """The paper names no thresholds; these are ours."""

    sink_threshold: float = setting(
        0.5,
        "dormant takes more than this share of attention on the first token",
        low=0.0,
        high=1.0,
        exclusive=True,
    )
    loss_threshold: float = setting(
        0.01, "dormant takes a loss change of at most this when zeroed", low=0.0, unit="nats/token"
    )
    fdr: float = setting(
        0.05,
        "share of false discoveries among the heads that are said to differ between domains",
        low=0.0,
        high=1.0,
        exclusive=True,
    )
    n_permutations: int | None = setting(
        None,
        "random relabellings of the prompts; none: so many that one head alone can pass",
        low=1,
    )
    n_rows: int | None = setting(
        None,
        "ablated prompts in one pass; none: 2048 tokens, or what 256 MiB of logits hold",
        low=1,
    )
    n_examples: int = setting(
        4, "heads whose pattern on one prompt of each domain is kept", low=0, unit="heads"
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ActiveDormantResult:
    """Heads of one model on several domains; ``labels["domain"]`` names them."""

    sink_attention: Float[Tensor, "domain layer head"]
    """Mean attention of queries n >= 2 to the first token, in [0, 1]."""
    sink_logit_gap: Float[Tensor, "domain layer head"]
    """Mean of S[n, 0] - mean over 1 <= j < n of S[n, j], in nats."""
    value_norm: Float[Tensor, "domain layer head"]
    """|v W_O| at position 0."""
    value_norm_ratio: Float[Tensor, "domain layer head"]
    """``value_norm`` over the mean of |v W_O| at the other positions."""
    ablation_loss: Float[Tensor, "domain layer head"]
    """Loss with the head's z zeroed minus without, in nats per token."""
    bos_loss: Float[Tensor, "domain layer head"]
    """Loss with the head's attention moved to the first token minus without, in nats per token."""
    row_entropy: Float[Tensor, "domain layer head"]
    """Mean entropy of a query's attention over log(n + 1), in [0, 1]."""
    column_entropy: Float[Tensor, "domain layer head"]
    """Entropy of the attention that keys receive over log T, in [0, 1]; 0: one key gets all."""
    p_sink: Float[Tensor, "layer head"]
    """Permutation test: is sink attention the same in all domains?"""
    p_loss: Float[Tensor, "layer head"]
    """Permutation test: is the ablation loss the same in all domains?"""
    q_sink: Float[Tensor, "layer head"]
    """``p_sink`` after Benjamini and Hochberg over all heads."""
    q_loss: Float[Tensor, "layer head"]
    dormant: Bool[Tensor, "domain layer head"]
    """See the module's docstring; equal in all domains where they are not shown to differ."""
    loss: Float[Tensor, " domain"]
    """With all heads in place, in nats per token."""
    resid_norm_bos: Float[Tensor, "domain entry_and_layer"]
    """|h| at position 0: at the entry, then after each block."""
    resid_norm_rest: Float[Tensor, "domain entry_and_layer"]
    """Mean of |h| at the other positions."""
    peak_without: Float[Tensor, "domain part layer"]
    """Largest |h| over depth at position 0 with one block's part zeroed; NaN: there is no MLP."""
    n_prompts: Int[Tensor, " domain"]
    example_head: Int[Tensor, "example 2"]
    """(layer, head) of the heads whose patterns are kept, the clearest first."""
    example_tokens: Int[Tensor, "domain example_pos"]
    """Beginning of each domain's first prompt; -1 past its end."""
    example_pattern: Float[Tensor, "example domain example_pos example_pos"]
    """Attention of those heads there; 0 past the prompt's end."""
    labels: dict[str, tuple[str, ...]]
    """``domain``, ``part``, and ``example_token``: the example's tokens as text, row by row."""
    config: ActiveDormantConfig = field(default_factory=ActiveDormantConfig)

    def classes(self) -> dict[str, Tensor]:
        """``[layer head]`` bool by class; every head is in one."""
        return classes(self.dormant)

    def resid_peak(self) -> Float[Tensor, " domain"]:
        """Largest residual norm over depth at position 0."""
        return self.resid_norm_bos.amax(dim=1)

    def peak_share(self) -> Float[Tensor, "part layer"]:
        """What is left of the peak without each part, as a share; mean over domains."""
        return (self.peak_without / self.resid_peak()[:, None, None]).mean(dim=0)

    def peak_maker(self) -> tuple[str, int]:
        """The part and the layer without which least of the peak is left."""
        share = self.peak_share().nan_to_num(nan=torch.inf)
        part, layer = divmod(int(share.argmin()), share.shape[1])
        return self.labels["part"][part], layer

    def metrics(self) -> dict[str, float]:
        """The headline numbers; see the module's docstring."""
        counts = {
            f"n_{name.replace(' ', '_').replace('-', '_')}": float(heads.sum())
            for name, heads in self.classes().items()
        }
        share = self.peak_share()
        ratio = self.resid_norm_bos / self.resid_norm_rest
        found = counts | {
            "n_different_sink": float((self.q_sink <= self.config.fdr).sum()),
            "n_different_loss": float((self.q_loss <= self.config.fdr).sum()),
            "smallest_p": 1.0 / n_relabellings(self.n_prompts),
            "resid_peak": self.resid_peak().mean().item(),
            "resid_peak_ratio": ratio.amax(dim=1).mean().item(),
            "n_prompts": float(self.n_prompts.sum()),
        }
        if not share[1].isnan().any():
            found["peak_mlp_layer"] = float(share[1].argmin())
            found["peak_share_without_mlp"] = share[1].min().item()
        return found

    def table(self) -> dict[str, list[int] | list[float] | list[str]]:
        """One row a domain and head."""
        n_domains, n_layers, n_heads = self.dormant.shape
        grid = torch.cartesian_prod(*map(torch.arange, (n_domains, n_layers, n_heads))).T.tolist()
        kinds = {name: heads.expand(self.dormant.shape) for name, heads in self.classes().items()}
        tests = {name: getattr(self, name).expand(self.dormant.shape) for name in _TESTS}
        return {
            "domain": [self.labels["domain"][index] for index in grid[0]],
            "layer": grid[1],
            "head": grid[2],
            "class": [
                next(name for name, heads in kinds.items() if heads[tuple(where)])
                for where in zip(*grid, strict=True)
            ],
            **{name: getattr(self, name).flatten().tolist() for name in _NUMBERS},
            **{name: values.flatten().tolist() for name, values in tests.items()},
        }


_NUMBERS = (
    "sink_attention",
    "sink_logit_gap",
    "value_norm",
    "value_norm_ratio",
    "ablation_loss",
    "bos_loss",
    "row_entropy",
    "column_entropy",
)
_TESTS = ("p_sink", "q_sink", "p_loss", "q_loss")

# Measurement


@probe(
    "active-dormant",
    config=ActiveDormantConfig,
    result=ActiveDormantResult,
    paper="arXiv:2410.13835",
    needs={"capture", "attention", "patterns", "streaming", "weights", "edits"},
)
def measure_active_dormant(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: ActiveDormantConfig,
    context: Context | None = None,
) -> ActiveDormantResult:
    """Find heads that are active on one kind of text and dormant on another."""
    context = context or Context()
    domains = domains_of(context)
    check_lengths(tokens, context)
    check_prompts(domains, config.fdr)
    n_heads = model.spec.n_layers * model.spec.n_heads
    n_permutations = choose_permutations(config.n_permutations, n_heads, config.fdr)
    found = measure_prompts(model, tokens, context, config.n_rows)
    zeroed, moved = found.change
    p_sink, p_loss = (
        permutation_p(x, domains, n_permutations, context.generator())
        for x in (found.activity["sink"], zeroed)
    )
    mean = {name: domains.mean(x) for name, x in found.activity.items()}
    q_sink, q_loss = adjusted(p_sink), adjusted(p_loss)
    ablation_loss = domains.mean(zeroed)
    dormant = _dormant(mean["sink"], ablation_loss, q_sink, q_loss, config)
    heads = choose_heads(mean["sink"], ablation_loss, dormant, config.n_examples)
    examples = read_examples(model, tokens, domains, heads, context)
    return ActiveDormantResult(
        sink_attention=mean["sink"],
        sink_logit_gap=mean["gap"],
        value_norm=mean["value_bos"],
        value_norm_ratio=mean["value_bos"] / mean["value_rest"],
        ablation_loss=ablation_loss,
        bos_loss=domains.mean(moved),
        row_entropy=mean["row_entropy"],
        column_entropy=mean["column_entropy"],
        p_sink=p_sink,
        p_loss=p_loss,
        q_sink=q_sink,
        q_loss=q_loss,
        dormant=dormant,
        loss=domains.mean(found.loss),
        resid_norm_bos=mean["resid_bos"],
        resid_norm_rest=mean["resid_rest"],
        peak_without=domains.mean(found.peaks),
        n_prompts=domains.sizes,
        **_examples(examples, heads),
        labels=_labels(domains, examples),
        config=config,
    )


def _dormant(
    sink: Float[Tensor, "domain layer head"],
    loss: Float[Tensor, "domain layer head"],
    q_sink: Float[Tensor, "layer head"],
    q_loss: Float[Tensor, "layer head"],
    config: ActiveDormantConfig,
) -> Bool[Tensor, "domain layer head"]:
    """The definition, with the domains apart only where chance would not set them apart."""
    return dormant_heads(
        judged(sink, q_sink <= config.fdr),
        judged(loss, q_loss <= config.fdr),
        config.sink_threshold,
        config.loss_threshold,
    )


def _examples(examples: Examples, heads: Tensor) -> dict[str, Tensor]:
    return {
        "example_head": heads,
        "example_tokens": examples.tokens,
        "example_pattern": examples.pattern,
    }


def _labels(domains: Domains, examples: Examples) -> dict[str, tuple[str, ...]]:
    return {"domain": domains.names, "part": PARTS, "example_token": examples.texts}
