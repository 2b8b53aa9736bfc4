"""ACT: damp the attention sinks beyond the first token, give what they free to the other keys.

With A the pattern of a head, S' its sinks without the first token and m = sum over S' of A[q, k]:

    A'[q, k] = beta A[q, k]                                       k in S'
    A'[q, k] = A[q, k] (1 + (1 - beta) m / (1 - m))               else, the first token included

A key is a sink when the mean attention it receives, c[k] = 1/(n - k) * sum over q of A[q, k], is
above alpha / n. Over which rows the mean goes is the mode:

* ``causal``: row q counts the rows up to itself, n = q + 1. Later tokens change nothing, so that
  decoding with a cache, decoding without one and one forward pass over the whole text agree.
* ``full``: every row of a prompt counts all its rows, n = T, as in the paper. It looks ahead: only
  the rows of the prompt itself do so; a decoded token, with the cache, counts all rows up to itself.

A row whose visible keys are all in S' is left alone. Learned sinks (GPT-OSS) and learned keys are
no tokens: never in S', and they take their share of what is freed.

Paper: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks", arXiv:2406.15765. Card: act
sections 1-4. The released code takes a fixed threshold of 0.1 for alpha / n, protects the first of
the sinks whichever it is, and is wrong under a KV cache and in batches; this is the paper's rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionEdit, Edit, TiledCall
from workbench.attention.streaming import (
    PatternAccumulator,
    PatternBlock,
    PatternShape,
    PatternStatistic,
)
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.models.base import ModelSpec
from workbench.settings import check_settings, setting


@dataclass(frozen=True)
class ACT:
    """Damp the attention sinks of some heads beyond the first token."""

    alpha: float = setting(
        5.0, "a key is a sink above alpha / n of a head's mean attention", low=0.0
    )
    beta: float = setting(
        0.4, "factor on the attention to sinks; 1 changes nothing", low=0.0, high=1.0
    )
    heads: Heads | None = None
    """(layer, head) pairs; None: all."""
    protect_first: bool = setting(True, "leave the first token alone")
    mode: str = setting(
        "causal", "rows that a sink is judged by: those before, or all", choices=("causal", "full")
    )
    name: str = "act"

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        check_settings(self)

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer, with statistics of its own; none for beta = 1."""
        grouped = heads_by_layer(self.heads, spec)
        if self.beta == 1.0:
            return []
        return [self._edit(layer, heads) for layer, heads in grouped.items()]

    def check_generation(self, options: dict[str, Any]) -> None:
        """Refuse ways of generating under which the rule is not defined.

        Raises:
            ConfigError: Beams, or whole-prompt statistics without a cache.
        """
        if options.get("num_beams", 1) > 1:
            raise ConfigError(
                "act must generate without beams, which reorder the rows that its statistics follow; "
                f"got num_beams={options['num_beams']}; sample, or take the most likely token"
            )
        if self.mode == "full" and options.get("use_cache") is False:
            raise ConfigError(
                "act with mode=full must generate with the cache: without it every new token would "
                "change the sinks of the rows before; leave use_cache=False out, or set mode=causal"
            )

    def _edit(self, layer: int, heads: list[int]) -> AttentionEdit:
        columns = RunningColumns()

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            columns.open(call)
            # A decoded token comes after the prompt: for it, all rows are those up to itself.
            ahead = self.mode == "full" and call.n_before <= 0
            whole = call.column_mean()[:, heads] if ahead else None

            def change(block: PatternBlock) -> Tensor:
                part = block.pattern[:, heads].float()
                place = Place(call, block)
                mean, n_tokens = columns.advance(place, part), place.tokens_so_far()
                if whole is not None:
                    mean = whole[block.batches, :, None, block.columns]
                    n_tokens = call.n_tokens[block.batches, None, None, None].to(part.device)
                sinks = place.tokens(after_first=self.protect_first)
                sinks = sinks & (mean * n_tokens > self.alpha)
                edited = block.pattern.clone()
                outside = None if block.outside is None else block.outside[:, heads]
                damped = damp(part, sinks, self.beta, outside=outside)
                edited[:, heads] = damped.to(edited.dtype)
                return edited

            return change

        return AttentionEdit(layer, output=None, pattern=None, begin=begin)


def damp(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    sinks: Bool[Tensor, "batch head #q_pos k_pos"],
    beta: float,
    *,
    outside: Float[Tensor, "batch head q_pos"] | None = None,
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """The rule: ``beta`` times the attention to sinks, the rest grows in proportion; rows keep sums.

    A row that sees nothing but sinks stays.

    Args:
        pattern: After softmax.
        sinks: The keys to damp, by row.
        beta: The factor on them.
        outside: What each row gives to a learned sink that is no key; counts as the rest.
    """
    damped = pattern.masked_fill(~sinks, 0.0).sum(dim=-1, keepdim=True)
    rest = pattern.masked_fill(sinks, 0.0).sum(dim=-1, keepdim=True)
    if outside is not None:
        rest = rest + outside[..., None]
    grown = 1.0 + (1.0 - beta) * damped / rest
    edited = torch.where(sinks, beta * pattern, grown * pattern)
    return torch.where(rest > 0.0, edited, pattern)


@dataclass(frozen=True)
class Place:
    """Where the rows and columns of a tile stand in their prompts."""

    call: TiledCall
    block: PatternBlock

    @property
    def rows(self) -> Int[Tensor, "q_pos one"]:
        """Positions of the queries."""
        block = self.block
        rows = torch.arange(block.pattern.shape[-2], device=block.pattern.device)
        return (rows + self.call.n_before + block.rows.start)[:, None]

    @property
    def keys(self) -> Int[Tensor, " k_pos"]:
        """Positions of the keys; learned ones stand below 0."""
        block = self.block
        keys = torch.arange(block.pattern.shape[-1], device=block.pattern.device)
        return keys + block.columns.start + self.call.first_column

    @property
    def first(self) -> Int[Tensor, "batch one one2 one3"]:
        """Position of each prompt's first token."""
        first = self.call.first_key[self.block.batches].to(self.block.pattern.device)
        return first[:, None, None, None] + self.call.first_column

    def tokens_so_far(self) -> Int[Tensor, "batch one q_pos one2"]:
        """Tokens of the prompt up to each query."""
        return self.rows - self.first + 1

    def tokens(self, *, after_first: bool) -> Bool[Tensor, "batch one one2 k_pos"]:
        """Which keys are tokens of the prompt, without the first if asked."""
        return self.keys > self.first if after_first else self.keys >= self.first


class RunningColumns:
    """Column sums of one layer's pattern, over the calls of one generation."""

    def __init__(self) -> None:
        self._total: Float[Tensor, "batch head k_pos"] | None = None
        self._first_column = 0

    @property
    def total(self) -> Float[Tensor, "batch head k_pos"]:
        """Attention that each key has received."""
        assert self._total is not None  # at least one tile has come
        return self._total

    def open(self, call: TiledCall) -> None:
        """Take notice of a new call: keys that have left the cache leave the sums."""
        gone = call.first_column - self._first_column
        if self._total is not None and call.n_before > 0 and gone > 0:
            self._total = self._total[..., gone:]
        self._first_column = call.first_column

    def advance(
        self, place: Place, part: Float[Tensor, "batch head q_pos k_pos"]
    ) -> Float[Tensor, "batch head q_pos k_pos"]:
        """Add a tile's rows; returns the mean that each key has received up to each row."""
        block = place.block
        if block.row_valid is not None:
            part = part * block.row_valid[:, None, :, None]
        total = self._grown(place, part)
        if block.rows.start == 0 and place.call.n_before <= 0:
            total[block.batches] = 0.0
        running = total[block.batches, :, block.columns][..., None, :] + part.cumsum(dim=-2)
        total[block.batches, :, block.columns] = running[..., -1, :]
        return running / (place.rows - place.keys + 1).clamp(min=1)

    def _grown(self, place: Place, part: Tensor) -> Float[Tensor, "batch head k_pos"]:
        """The sums, with room for the tile's columns."""
        batch, stop = place.call.first_key.shape[0], place.block.columns.stop
        if self._total is None or (place.call.n_before <= 0 and self._total.shape[0] != batch):
            self._total = part.new_zeros(batch, part.shape[1], stop)
        missing = stop - self._total.shape[-1]
        if missing > 0:
            self._total = torch.nn.functional.pad(self._total, (0, missing))
        return self._total


@dataclass(frozen=True)
class DampedMass(PatternStatistic):
    """The attention that ACT would damp, summed over all rows. ``[batch head]``; 0: it does nothing.

    Padding must be on the left or known by rows; the mode is that of the intervention.
    """

    act: ACT

    def start(self, shape: PatternShape) -> PatternAccumulator:
        """Begin to collect it for one layer."""
        return _DampedMass(self.act, shape)


class _DampedMass(PatternAccumulator):
    def __init__(self, act: ACT, shape: PatternShape) -> None:
        valid = shape.row_valid
        first = torch.zeros(shape.batch, dtype=torch.long, device=shape.device)
        n_tokens = first + shape.n_q
        if valid is not None:
            first, n_tokens = valid.argmax(dim=1), valid.sum(dim=1).long()
        self._call = TiledCall(0, 0, first, n_tokens, _not_asked, _not_asked)
        self._act, self._columns = act, RunningColumns()
        self._mass = torch.zeros(shape.batch, shape.n_heads, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        place, part = Place(self._call, block), block.pattern.float()
        mean = self._columns.advance(place, part)
        if self._act.mode == "causal":
            sinks = place.tokens(after_first=self._act.protect_first)
            sinks = sinks & (mean * place.tokens_so_far() > self._act.alpha)
            self._mass[block.batches] += part.masked_fill(~sinks, 0.0).sum(dim=(-1, -2))

    def finish(self) -> Float[Tensor, "batch head"]:
        if self._act.mode == "causal":
            return self._mass
        total = self._columns.total
        keys = torch.arange(total.shape[-1], device=total.device)
        first, n_tokens = self._call.first_key[:, None], self._call.n_tokens[:, None]
        after = (first + n_tokens - keys).clamp(min=1)[:, None]
        judged = (keys > first if self._act.protect_first else keys >= first)[:, None]
        sinks = judged & (total / after * n_tokens[:, None] > self._act.alpha)
        return total.masked_fill(~sinks, 0.0).sum(dim=-1)


def _not_asked(*_: Any) -> Tensor:
    raise AssertionError("a statistic asks for neither scores nor means")
