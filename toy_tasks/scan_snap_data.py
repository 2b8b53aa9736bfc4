"""Sequence classes of the scan-snap toy: settings, token ids, and batches as token counts.

A sequence has n_pos - 1 contextual tokens, then a query, then the token to be predicted. The
predicted token n is also the class: it has its own query psi(n) and its own law P(l|n) over
contextual tokens, from which they are drawn with replacement. Token ids stand in this order:

    common           n_common                in every class, weight 1
    common of query  n_common_per_query each in the classes of one query, weight 1
    distinct         n_distinct each         in one class, weights evenly spaced from 0.1 to 1
    queries          n_queries
    next tokens      one a class, n_classes_per_query for each query

Attention has no positions, so a sequence matters only through how often each token occurs in it: a
batch is its counts.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import ConfigError
from workbench.settings import check_settings, setting

MAX_VOCABULARY = 10_000
"""Tokens; the decoder is a full matrix over pairs of them."""
MAX_RECORDED = 10**8
"""Numbers of a record, 8 bytes each; it is kept in memory and written whole."""


@dataclass(frozen=True)
class ScanSnapConfig:
    """Settings of one run; the defaults are the paper's small set (its Fig. 4)."""

    lr_z: float = setting(1.0, "learning rate of the attention Z", low=0.0, exclusive=True)
    lr_ratio: float = setting(
        1.0, "learning rate of the decoder Y over that of Z", low=0.0, exclusive=True
    )
    steps: int = setting(100, "updates", low=1, high=10_000_000)
    seed: int = setting(2, "seed of the batches and the first weights", low=0)
    batch_size: int = setting(128, "sequences of a step", low=1)
    n_pos: int = setting(128, "tokens of a sequence, the query included", low=2, unit="tokens")
    n_queries: int = setting(2, "query tokens", low=1)
    n_classes_per_query: int = setting(1, "next tokens, that is classes, of a query", low=1)
    n_common: int = setting(10, "contextual tokens that all classes have", low=0)
    n_common_per_query: int = setting(
        0, "contextual tokens that the classes of one query have", low=0
    )
    n_distinct: int = setting(10, "contextual tokens that only one class has", low=1)
    momentum: float = setting(0.9, "share of the last update that is repeated", low=0.0, high=0.999)
    optimizer: str = setting(
        "sgd",
        "sgd, or adam with momentum as its beta1 (the paper's Fig. 5, at lr_ratio 1)",
        choices=("sgd", "adam"),
    )
    init: str = setting(
        "zero",
        "first weights: zero, normal, or uniform in +-1/sqrt(M); the last two have one variance",
        choices=("zero", "normal", "uniform"),
    )
    record_every: int = setting(1, "steps between two checkpoints", low=1, unit="steps")

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)
        if self.n_tokens > MAX_VOCABULARY:
            raise ConfigError(
                f"the vocabulary must have at most {MAX_VOCABULARY} tokens; these counts make "
                f"{self.n_tokens}; lower n_queries, n_classes_per_query or n_distinct"
            )
        n_checkpoints = self.steps // self.record_every + 2
        recorded = n_checkpoints * (self.n_queries + self.n_classes) * self.n_tokens
        if recorded > MAX_RECORDED:
            raise ConfigError(
                f"a record must have at most {MAX_RECORDED} numbers; {n_checkpoints} checkpoints "
                f"make {recorded}; raise record_every"
            )

    @property
    def n_classes(self) -> int:
        """K."""
        return self.n_queries * self.n_classes_per_query

    @property
    def n_context(self) -> int:
        """How many tokens can stand before the query; their ids come first."""
        per_query = self.n_common_per_query * self.n_queries
        return self.n_common + per_query + self.n_distinct * self.n_classes

    @property
    def n_tokens(self) -> int:
        """M, queries and next tokens included."""
        return self.n_context + self.n_queries + self.n_classes


SYN_MEDIUM = ScanSnapConfig(n_queries=1, n_classes_per_query=2, init="uniform")
"""The paper's larger set (its Fig. 6), which has 1, 3, 5 or 10 queries."""


@dataclass(frozen=True)
class ClassLaw:
    """What each class draws its contextual tokens from."""

    prob: Float[Tensor, "class token"]
    """P(l|n), float64; rows sum to 1."""
    is_distinct: Bool[Tensor, "class token"]
    """Tokens that only this class has."""
    query: Int[Tensor, " class"]
    """psi(n) as an index among the queries."""
    next_token: Int[Tensor, " class"]
    """The id that is to be predicted."""

    @property
    def is_common(self) -> Bool[Tensor, "class token"]:
        """Tokens of this class that are not its own alone."""
        return (self.prob > 0) & ~self.is_distinct


class Batch(NamedTuple):
    """Sequences of several runs, as counts; a run may share its sequences with another."""

    counts: Float[Tensor, "run batch token"]
    """How often each contextual token occurs."""
    query: Int[Tensor, "run batch"]
    """Index among the queries."""
    target: Int[Tensor, "run batch"]
    """Id of the next token."""


def class_law(config: ScanSnapConfig) -> ClassLaw:
    """Lay the tokens out and give each class its probabilities."""
    n_classes, n_tokens = config.n_classes, config.n_tokens
    query = torch.arange(n_classes) // config.n_classes_per_query
    weight = torch.zeros(n_classes, n_tokens, dtype=torch.float64)
    is_distinct = torch.zeros(n_classes, n_tokens, dtype=torch.bool)
    weight[:, : config.n_common] = 1.0
    first_distinct = config.n_common + config.n_common_per_query * config.n_queries
    for row in range(n_classes):
        start = config.n_common + config.n_common_per_query * int(query[row])
        weight[row, start : start + config.n_common_per_query] = 1.0
        start = first_distinct + config.n_distinct * row
        own = slice(start, start + config.n_distinct)
        weight[row, own] = torch.linspace(0.1, 1.0, config.n_distinct, dtype=torch.float64)
        is_distinct[row, own] = True
    next_token = config.n_context + config.n_queries + torch.arange(n_classes)
    return ClassLaw(weight / weight.sum(dim=1, keepdim=True), is_distinct, query, next_token)


def draw_batch(law: ClassLaw, size: tuple[int, int], generators: list[torch.Generator]) -> Batch:
    """Draw the sequences of one step, from one generator a run.

    Args:
        law: What they are drawn from.
        size: Sequences a run, and contextual tokens of each.
        generators: One a run.
    """
    rows = []
    for generator in generators:
        classes, counts = _draw(law, size, generator)
        rows.append(Batch(counts, law.query[classes], law.next_token[classes]))
    return Batch(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def draw_sequences(
    law: ClassLaw, size: tuple[int, int], generator: torch.Generator
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Draw sequences as tokens, the query last, and their next tokens.

    From a generator of the same seed, they are those that ``draw_batch`` counts.
    """
    classes, counts = _draw(law, size, generator)
    ids = torch.arange(counts.shape[1]).expand_as(counts).flatten()
    in_order = ids.repeat_interleave(counts.flatten().long()).view(size)
    order = torch.rand(size, generator=generator).argsort(dim=1)
    first_query = int(law.next_token[0]) - int(law.query[-1]) - 1
    query = first_query + law.query[classes]
    return torch.cat([in_order.gather(1, order), query[:, None]], dim=1), law.next_token[classes]


def _draw(
    law: ClassLaw, size: tuple[int, int], generator: torch.Generator
) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch token"]]:
    """Classes, and the counts of each sequence's contextual tokens.

    Counts are drawn as such, a multinomial for all sequences of a class: a binomial number a token
    of the class costs less than a draw a position.
    """
    batch_size, n_drawn = size
    classes = torch.randint(len(law.prob), (batch_size,), generator=generator)
    seed = torch.randint(2**62, (1,), generator=generator).item()
    numbers = np.random.default_rng(int(seed))
    counts = np.zeros((batch_size, law.prob.shape[1]))
    prob, row_class = law.prob.numpy(), classes.numpy()
    for row, of_class in enumerate(prob):
        mine = np.flatnonzero(row_class == row)
        possible = np.flatnonzero(of_class)
        drawn = numbers.multinomial(n_drawn, of_class[possible], size=len(mine))
        counts[mine[:, None], possible] = drawn
    return classes, torch.from_numpy(counts)
