"""Successor heads: heads whose OV circuit sends an item of a series to the next one.

With rows as vectors, E, V, O, U the embedding, value, output and unembedding matrices, and the biases
left out, head h makes of token s

    L[s] = MLP0(norm(E[s])) V_h O_h U        logits over the candidates of s's series

The score of a head is the share of pairs (s, next of s), all series pooled, whose target is the
strict maximum of L[s] over the targets of its series and written form (float32; a tie is not found).
Beside it: the score per task, the greater-than bias, attention in lists, sparse and linear features
of the last digit, steering by vector arithmetic, index/domain factoring, and, with prompts, the
direct effect of every head on text. The files ``successor_heads_*`` have one each.

Paper: Gould et al. 2023, "Successor Heads: Recurring, Interpretable Attention Heads In The Wild",
arXiv:2312.09230. Departures: the norm before the first MLP is applied (``ln``); features are those of
a few autoencoders on centred, scaled vectors, not of a hundred; index and domain are factored by
ridge regression and decoded to the nearest token.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.successor_heads_attention import list_attention
from probes.successor_heads_categories import CATEGORIES
from probes.successor_heads_digits import (
    digit_problem,
    study_digits,
    study_factoring,
)
from probes.successor_heads_features import SaeSettings
from probes.successor_heads_scores import (
    TokenPath,
    Vocabulary,
    chance,
    head_weights,
    score_layer,
    task_of_pairs,
    vocabulary_of,
)
from probes.successor_heads_steering import SCALES
from probes.successor_heads_text import ablate_on_text, check_text
from probes.successor_heads_tokens import TokenSets, find_token_sets
from workbench.context import Context
from workbench.errors import CapabilityError, DataError
from workbench.models.base import ModelAdapter
from workbench.registry import probe
from workbench.settings import check_settings, setting

# Config and result


@dataclass(frozen=True)
class SuccessorHeadsConfig:
    """Defaults are the paper's where it states them."""

    forms: str = setting(
        "all",
        "how items are written: with and without space and with the first letter's case inverted, or "
        "one of the first two alone",
        choices=("all", "space", "bare"),
    )
    mlp0: bool = setting(True, "pass tokens through the first MLP; false is the control")
    ln: str = setting(
        "ln2", "the norm before the first MLP, or none of it", choices=("ln2", "none")
    )
    include_residual: bool = setting(False, "add the embedding to what the first MLP makes of it")
    sae_features: int = setting(64, "features of an autoencoder", low=10)
    sae_penalty: float = setting(
        0.03, "weight of its L1 norm, for vectors of mean square norm 1", low=0.0
    )
    sae_steps: int = setting(600, "training steps of an autoencoder", low=1)
    sae_seeds: int = setting(3, "autoencoders, of which the modal features are taken", low=1)
    steering_scale: float = setting(
        1.0, "strength of steering; 1 replaces a digit at its own strength", low=0.0, exclusive=True
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def path(self) -> TokenPath:
        """What a token passes before a head reads it."""
        return TokenPath(self.mlp0, self.ln == "ln2", self.include_residual)


@dataclass(frozen=True)
class SuccessorHeadsResult:
    """Of one model; what could not be measured with its tokenizer is absent."""

    score: Float[Tensor, "layer head"]
    """Share of all pairs found, in [0, 1]."""
    score_by_task: Float[Tensor, "task layer head"]
    """The same within each task."""
    n_pairs: Int[Tensor, " task"]
    """Pairs of single tokens, all written forms together."""
    filter_counts: Int[Tensor, "filter count"]
    """Per series and form: items, single tokens, pairs."""
    summary: Float[Tensor, " summary"]
    """Further numbers, by the names in the labels."""
    greater_than_bias: Float[Tensor, "layer head"] | None = None
    """In standard deviations of a source's logits, series that do not wrap around."""
    wrong_above: Float[Tensor, "layer head"] | None = None
    """Of the pairs not found, the share that goes above the source; NaN where all are found."""
    list_attention: Float[Tensor, "layer head"] | None = None
    """Attention from the end of a list to its last item, in [0, 1]."""
    mod10_features: Float[Tensor, "residue d_model"] | None = None
    """Unit decoder rows of the autoencoder, one a last digit."""
    feature_logits: Float[Tensor, "residue named"] | None = None
    """What the best head makes of each, by the last digit it names; rows standardised."""
    probe_accuracy_by_task: Float[Tensor, " task"] | None = None
    """Of the probe fitted on numbers; for numbers themselves on tens that it has not seen."""
    steering_success: Float[Tensor, " task"] | None = None
    """Share of (source, other digit) that the best head follows; NaN: none possible."""
    steering_table: Float[Tensor, "source residue"] | None = None
    """1 followed, 0 not, NaN impossible; the column of the own digit is left as it is."""
    steered_index: Int[Tensor, "source residue"] | None = None
    """Index of the item that the head names."""
    steering_by_scale: Float[Tensor, "scale task"] | None = None
    direct_effect: Float[Tensor, "layer head"] | None = None
    """On text: mean fall of the correct token's logit under direct mean ablation."""
    winning_share: Float[Tensor, "layer head"] | None = None
    """On text: share of prefixes for which the head's ablation hurts the most."""
    winning_categories: Float[Tensor, "judged category"] | None = None
    """Of the prefixes that the best head wins."""
    config: SuccessorHeadsConfig = field(default_factory=SuccessorHeadsConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, int]:
        """(layer, head) of the highest score; the first of equals."""
        return best_head(self.score)

    def macro_score(self) -> Float[Tensor, "layer head"]:
        """Mean of the tasks' scores: numbers do not outweigh the others."""
        return self.score_by_task.mean(dim=0)

    def metrics(self) -> dict[str, float]:
        """The headline numbers; see the docs for those of ``summary``."""
        layer, head = self.best
        found = {
            "best_layer": float(layer),
            "best_head": float(head),
            "best_score": self.score.max().item(),
            "best_macro_score": self.macro_score()[layer, head].item(),
        }
        if self.score.numel() > 1:
            found["second_score"] = self.score.flatten().topk(2).values[1].item()
        if self.greater_than_bias is not None:
            found["greater_than_bias"] = self.greater_than_bias[layer, head].item()
        if self.list_attention is not None:
            found["list_attention"] = self.list_attention[layer, head].item()
        names = self.labels.get("summary", ())
        return found | dict(zip(names, self.summary.tolist(), strict=True))

    def table(self) -> dict[str, list[int] | list[float]]:
        """One row a head: scores, pooled and by task, bias and attention."""
        n_layers, n_heads = self.score.shape
        layers = torch.arange(n_layers).repeat_interleave(n_heads)
        columns = {"score": self.score, "macro_score": self.macro_score()}
        columns |= {
            f"score {task}": score
            for task, score in zip(self.labels.get("task", ()), self.score_by_task, strict=True)
        }
        for name in ("greater_than_bias", "list_attention", "direct_effect", "winning_share"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        return {
            "layer": layers.tolist(),
            "head": torch.arange(n_heads).repeat(n_layers).tolist(),
        } | {name: values.flatten().tolist() for name, values in columns.items()}


def best_head(score: Float[Tensor, "layer head"]) -> tuple[int, int]:
    """(layer, head) of the highest score; the first of equals."""
    layer, head = divmod(int(score.argmax()), score.shape[1])
    return layer, head


# Measurement


@probe(
    "successor-heads",
    config=SuccessorHeadsConfig,
    result=SuccessorHeadsResult,
    paper="arXiv:2312.09230",
    needs={"weights", "attention"},
    needs_data=False,
    takes_data=True,
)
def measure_successor_heads(
    model: ModelAdapter,
    tokens: Int[Tensor, "batch pos"],
    config: SuccessorHeadsConfig,
    context: Context | None = None,
) -> SuccessorHeadsResult:
    """Find the heads that send items of a series to the next one, and how they do it."""
    context = context or Context()
    sets = _check(model, tokens, config, context)
    vocabulary = vocabulary_of(model, sets.scored, config.path)
    heads = _score_heads(model, sets, vocabulary, context)
    score = heads["score"]
    assert score is not None  # only the biases may be
    layer, head = best_head(score)
    w_v, w_o = head_weights(model, layer)
    numbers = {"chance": chance(sets.scored)}
    numbers |= study_factoring(model, sets, vocabulary, config.path, context)
    labels = {"task": sets.tasks, "filter": sets.filter_lines()}
    found: dict[str, Tensor | None] = dict(heads)
    problem = digit_problem(sets)
    if problem is not None:
        labels["left_out"] = (problem,)
    else:
        settings = SaeSettings(config.sae_features, config.sae_penalty, config.sae_steps)
        sae = (settings, config.sae_seeds, config.steering_scale)
        digits = study_digits(sets, vocabulary, (w_v[head], w_o[head]), sae, context)
        found |= digits.arrays()
        numbers |= digits.numbers
        labels |= {"source": digits.steering.sources, "scale": tuple(map(str, SCALES))}
    found["list_attention"] = list_attention(model, sets, context)
    if len(tokens):
        effects = ablate_on_text(model, tokens, (layer, head), context)
        found |= effects.arrays()
        numbers |= effects.numbers(layer, head)
        labels |= {"category": CATEGORIES, "judged": ("five most attended", "most attended")}
    labels["summary"] = tuple(numbers)
    return SuccessorHeadsResult(
        **found,  # type: ignore[arg-type]
        n_pairs=torch.tensor([sum(len(one.pairs()) for one in sets.of(t)) for t in sets.tasks]),
        filter_counts=torch.tensor(
            [(len(s.series.items), len(s.ids), len(s.pairs())) for s in sets.looked_up]
        ),
        summary=torch.tensor(list(numbers.values())),
        config=config,
        labels=labels,
    )


def _check(
    model: ModelAdapter, tokens: Tensor, config: SuccessorHeadsConfig, context: Context
) -> TokenSets:
    if model.spec.n_heads == 0:
        raise CapabilityError(
            f"successor-heads needs attention heads; {model.spec.name} ({model.spec.family}) has none; "
            "use a transformer"
        )
    if model.tokenizer is None:
        raise DataError(
            f"successor-heads needs a tokenizer to find the series; {model.spec.name} has none; give "
            "one with wb.wrap(model, tokenizer)"
        )
    if len(tokens):
        check_text(model, tokens, context)
    return find_token_sets(model.tokenizer, config.forms, model.spec.name)


def _score_heads(
    model: ModelAdapter, sets: TokenSets, vocabulary: Vocabulary, context: Context
) -> dict[str, Tensor | None]:
    """Scores and biases of every head, a layer at a time."""
    n_layers = model.spec.n_layers
    parts = []
    for layer in range(n_layers):
        parts.append(
            context.piece(f"layer-{layer}", lambda at=layer: score_layer(model, at, vocabulary))
        )
        context.progress(layer + 1, n_layers)
    found = torch.stack([part["found"] for part in parts])
    task = task_of_pairs(vocabulary.sets, sets.tasks)
    by_task = [found[..., task == t].mean(dim=-1) for t in range(len(sets.tasks))]
    greater = torch.stack([part["greater"] for part in parts])
    wrong = torch.stack([part["wrong"] for part in parts])
    ordered = greater.shape[-1] > 0
    return {
        "score": found.mean(dim=-1),
        "score_by_task": torch.stack(by_task),
        "greater_than_bias": greater.mean(dim=-1) if ordered else None,
        "wrong_above": wrong[..., 1] / wrong[..., 0] if ordered else None,
    }
