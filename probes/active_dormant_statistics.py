"""Means by domain, the permutation test between domains, and the classes of heads.

The prompt is the unit: a number of a domain is the mean over its prompts of each prompt's own mean,
and under the null hypothesis the domain labels of the prompts can be exchanged. The statistic of a
head is the range (largest minus smallest) of its domain means; with B random relabellings

    p = (1 + number of relabellings with a range at least as large) / (1 + B)

which is never below the true level. q-values are those of Benjamini and Hochberg over all heads: the
heads with q at most f are called different with an expected share of f false ones among them.

Paper: Guo et al. 2024, arXiv:2410.13835 shows one head's means without a test.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.context import Context
from workbench.errors import ConfigError, DataError

MIN_PERMUTATIONS = 9_999
CHUNK = 256
"""Relabellings that are made at once."""


@dataclass(frozen=True)
class Domains:
    """Which prompt belongs to which domain."""

    names: tuple[str, ...]
    index: Int[Tensor, " prompt"]
    """Index into ``names``."""

    @property
    def sizes(self) -> Int[Tensor, " domain"]:
        """Prompts of each domain."""
        return torch.bincount(self.index, minlength=len(self.names))

    def mean(self, x: Float[Tensor, "prompt ..."]) -> Float[Tensor, "domain ..."]:
        """Mean over each domain's prompts; NaN entries are left out."""
        return torch.stack([x[self.index == d].nanmean(dim=0) for d in range(len(self.names))])


def domains_of(context: Context) -> Domains:
    """Read the domains, in the order in which they come: as they were named, else from the rows.

    Raises:
        DataError: Fewer than two, or rows of which some have no ``domain``.
    """
    labels = context.labels.get("domain") or _domain_column(context.rows)
    names = tuple(dict.fromkeys(labels))
    if len(names) < 2:
        found = f"one, {names[0]!r}" if names else "prompts without domains"
        raise DataError(
            f"active-dormant compares two or more domains of prompts; got {found}; give "
            "--data NAME=FILE once per domain, a dict of name -> prompts, or rows with a domain field"
        )
    return Domains(names, torch.tensor([names.index(label) for label in labels]))


def _domain_column(rows: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    missing = [index for index, row in enumerate(rows) if "domain" not in row]
    if missing and len(missing) < len(rows):
        raise DataError(
            f"every row must have a domain, or none; row {missing[0]} has none; add it, or leave the "
            "row out"
        )
    return () if missing else tuple(str(row["domain"]) for row in rows)


# The test


def n_relabellings(sizes: Int[Tensor, " domain"]) -> int:
    """How many relabellings the range of means can tell apart; the smallest p is 1 over it.

    Domains of equal size can swap their names without changing the range.
    """
    counts = [int(size) for size in sizes]
    ways = math.factorial(sum(counts)) // math.prod(map(math.factorial, counts))
    swaps = math.prod(math.factorial(counts.count(size)) for size in set(counts))
    return ways // swaps


def prompts_needed(n_domains: int, level: float) -> int:
    """Prompts a domain, all domains alike, with which a p of at most ``level`` can come out."""
    needed = 1
    while n_relabellings(torch.full((n_domains,), needed)) < 1.0 / level:
        needed += 1
    return needed


def check_prompts(domains: Domains, fdr: float) -> None:
    """Refuse so few prompts that no difference could ever be found.

    Raises:
        DataError: Says how many are needed.
    """
    if n_relabellings(domains.sizes) >= 1.0 / fdr:
        return
    pairs = zip(domains.names, domains.sizes.tolist(), strict=True)
    raise DataError(
        f"the permutation test needs at least {prompts_needed(len(domains.names), fdr)} prompts a "
        f"domain to reach p = {fdr:g}; got {', '.join(f'{n} of {name}' for name, n in pairs)}; give "
        "more prompts, or set a larger fdr"
    )


def choose_permutations(wanted: int | None, n_heads: int, fdr: float) -> int:
    """The number of relabellings: so many that one head alone can pass the correction.

    Raises:
        ConfigError: Fewer were asked for.
    """
    needed = math.ceil(n_heads / fdr)
    if wanted is None:
        return max(MIN_PERMUTATIONS, needed)
    if wanted < needed:
        raise ConfigError(
            f"n_permutations must be at least {needed}, so that one of {n_heads} heads alone can pass "
            f"fdr={fdr:g}; got {wanted}; leave it out to have as many as it takes"
        )
    return wanted


def range_of_means(
    x: Float[Tensor, "prompt head"], index: Int[Tensor, "draw prompt"], n_domains: int
) -> Float[Tensor, "draw head"]:
    """Largest minus smallest domain mean, for every relabelling."""
    members = torch.nn.functional.one_hot(index, n_domains).to(x)
    means = torch.einsum("npd,ph->ndh", members, x) / members.sum(dim=1)[..., None]
    return means.amax(dim=1) - means.amin(dim=1)


def permutation_p(
    x: Float[Tensor, "prompt ..."], domains: Domains, n: int, generator: torch.Generator
) -> Float[Tensor, "..."]:
    """p-value of every entry: could the prompts' domain labels be exchanged?

    Args:
        x: One number a prompt and head.
        domains: The labels.
        n: Random relabellings.
        generator: Draws them; all entries see the same ones.
    """
    flat = x.flatten(1).double()
    n_domains = len(domains.names)
    observed = range_of_means(flat, domains.index[None], n_domains)[0]
    # A relabelling that changes nothing must count, however its sums were rounded.
    bound = observed - 1e-9 * flat.abs().amax(dim=0)
    exceeded = torch.ones_like(observed)
    for start in range(0, n, CHUNK):
        order = torch.rand(min(CHUNK, n - start), len(flat), generator=generator).argsort(dim=1)
        ranges = range_of_means(flat, domains.index[order], n_domains)
        exceeded += (ranges >= bound).sum(dim=0)
    return (exceeded / (n + 1)).float().view(x.shape[1:])


def adjusted(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """q-values of Benjamini and Hochberg (1995): min over p' >= p of p' m / rank(p')."""
    ordered, order = p.flatten().double().sort()
    rank = torch.arange(1, len(ordered) + 1)
    q = (ordered * len(ordered) / rank).flip(0).cummin(dim=0).values.flip(0)
    return torch.empty_like(q).scatter(0, order, q).clamp(max=1.0).float().view(p.shape)


# Classes


def judged(
    mean: Float[Tensor, "domain layer head"], differs: Bool[Tensor, "layer head"]
) -> Float[Tensor, "domain layer head"]:
    """The number that is held against a threshold.

    It is the domain's own where domains are shown to differ, the mean over domains elsewhere.
    """
    return torch.where(differs, mean, mean.mean(dim=0, keepdim=True).expand_as(mean))


def dormant_heads(
    sink: Float[Tensor, "domain layer head"],
    loss: Float[Tensor, "domain layer head"],
    sink_threshold: float,
    loss_threshold: float,
) -> Bool[Tensor, "domain layer head"]:
    """Dormant: more than so much attention on the first token, and not missed when zeroed."""
    return (sink > sink_threshold) & (loss <= loss_threshold)


def classes(dormant: Bool[Tensor, "domain layer head"]) -> dict[str, Bool[Tensor, "layer head"]]:
    """Always active, active-dormant or always dormant: every head is one of them."""
    some, every = dormant.any(dim=0), dormant.all(dim=0)
    return {"always active": ~some, "active-dormant": some & ~every, "always dormant": every}
