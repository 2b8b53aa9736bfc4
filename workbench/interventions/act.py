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

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionEdit, Edit, RowCall, TiledCall
from workbench.attention.scores import wide
from workbench.attention.streaming import (
    PatternAccumulator,
    PatternBlock,
    PatternShape,
    PatternStatistic,
)
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.interventions.running_columns import Place, RunningColumns
from workbench.models.base import ModelSpec
from workbench.settings import check_settings, setting

SMALLEST = 1e-38
"""What a row without anything but sinks is divided by."""


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
        return [
            self._edit(layer, None if len(set(heads)) == spec.n_heads else heads)
            for layer, heads in grouped.items()
        ]

    def check_generation(self, options: dict[str, Any]) -> None:
        """Refuse ways of generating under which the rule is not defined.

        Raises:
            ConfigError: Whole-prompt statistics without a cache, or of a prompt that comes in parts.
        """
        if self.mode == "full" and options.get("use_cache") is False:
            raise ConfigError(
                "act with mode=full must generate with the cache: without it every new token would "
                "change the sinks of the rows before; leave use_cache=False out, or set mode=causal"
            )
        if self.mode == "full" and options.get("prefill_chunk_size"):
            raise ConfigError(
                "act with mode=full must see the prompt at once; got prefill_chunk_size="
                f"{options['prefill_chunk_size']}; leave it out, or set mode=causal"
            )

    def _edit(self, layer: int, heads: list[int] | None) -> AttentionEdit:
        columns = RunningColumns()
        # All heads are not picked out: copies of a tile cost as much as its softmax.
        picked = slice(None) if heads is None else heads

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            columns.open(call)
            # A decoded token comes after the prompt: for it, all rows are those up to itself.
            ahead = self.mode == "full" and call.n_before <= 0
            whole = self._sinks_of_all_rows(call)[:, picked] if ahead else None

            def change(block: PatternBlock) -> Tensor:
                part = wide(block.pattern[:, picked])
                place = Place(call, block)
                if whole is None:
                    sinks = columns.advance(place, part) > self.bound(place)
                else:
                    columns.add(place, part)
                    sinks = whole[block.batches, :, None, block.columns]
                outside = None if block.outside is None else block.outside[:, picked]
                damped = damp(part, sinks, self.beta, outside=outside).to(block.pattern.dtype)
                if heads is None:
                    return damped
                edited = block.pattern.clone()
                edited[:, heads] = damped
                return edited

            return change

        def row(call: RowCall, pattern: Tensor, outside: Tensor | None) -> Tensor:
            if heads is None:
                return self._damp_row(call, columns, pattern, outside)
            edited = pattern.clone()
            others = None if outside is None else outside[:, heads]
            edited[:, heads] = self._damp_row(call, columns, pattern[:, heads], others)
            return edited

        return AttentionEdit(layer, None, None, begin, columns.reorder, row=row)

    def _damp_row(
        self,
        call: RowCall,
        columns: RunningColumns,
        part: Float[Tensor, "batch head one k_pos"],
        outside: Float[Tensor, "batch head one"] | None,
    ) -> Float[Tensor, "batch head one k_pos"]:
        """The rule for a decoded token, alike in both modes."""
        n_keys = part.shape[-1]
        # From the first key in the cache, as columns count.
        row = call.n_before - call.first_column
        rule, place = (self.alpha, self.protect_first), (call.first_key, n_keys, row, part.device)
        bound = call.shared.get("act", _row_bound, *rule, *place)
        received = columns.follow(part, call.first_column)
        return damp(part, received > bound, self.beta, outside=outside)

    def bound(self, place: Place) -> Float[Tensor, "batch one q_pos k_pos"]:
        """What a key of each row must have received so far to be a sink: alpha / n times its rows.

        Infinite for keys that are not judged. One comparison with it, alike for all heads, stands for
        a mean, a product and a mask of every head's tile.
        """
        n_rows = (place.rows - place.keys + 1).clamp(min=1)
        bound = n_rows * (self.alpha / place.tokens_so_far().clamp(min=1))
        return bound.masked_fill(~place.tokens(after_first=self.protect_first), torch.inf)

    def _sinks_of_all_rows(self, call: TiledCall) -> Bool[Tensor, "batch head k_pos"]:
        """The sinks of a prompt by the mean over all its rows."""
        mean = call.column_mean()
        keys = torch.arange(mean.shape[-1], device=mean.device)
        first = call.first_key.to(mean.device)[:, None, None]
        judged = keys > first if self.protect_first else keys >= first
        n_tokens = call.n_tokens.to(mean.device)[:, None, None]
        return judged & (mean * n_tokens > self.alpha)


def _row_bound(
    alpha: float,
    protect_first: bool,
    first_key: Int[Tensor, " batch"] | None,
    n_keys: int,
    row: int,
    device: torch.device,
) -> Float[Tensor, "#batch one one2 k_pos"]:
    """``ACT.bound`` for one decoded token, its column and that of the first key given."""
    keys = torch.arange(n_keys, device=device)
    first = keys[:1, None] if first_key is None else first_key[:, None]
    bound = (row - keys + 1) * (alpha / (row - first + 1))
    judged = keys > first if protect_first else keys >= first
    return bound.masked_fill(~judged, torch.inf)[:, None, None]


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
    # Most decoded rows have no sink; on a GPU the question would make it wait.
    if sinks.device.type == "cpu" and not bool(sinks.any()):
        return pattern
    on_sinks = torch.where(sinks, pattern, 0.0)
    on_rest = pattern - on_sinks
    # Not 1 - the sinks' sum: where nearly all goes to sinks, little would be right of it.
    rest = on_rest.sum(dim=-1, keepdim=True)
    if outside is not None:
        rest = rest + outside[..., None]
    freed = (rest > 0.0).to(rest) * (1.0 - beta)
    gain = freed * on_sinks.sum(dim=-1, keepdim=True) / rest.clamp(min=SMALLEST)
    return torch.addcmul(pattern, on_sinks, freed, value=-1.0).addcmul_(on_rest, gain)


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
        self._act, self._n_keys = act, shape.n_k
        # Tiles of long prompts hold some of the heads only: each part of the heads has its own sums.
        self._columns: defaultdict[int, RunningColumns] = defaultdict(RunningColumns)
        self._mass = torch.zeros(shape.batch, shape.n_heads, device=shape.device)

    def update(self, block: PatternBlock) -> None:
        place, part = Place(self._call, block), block.pattern.float()
        columns = self._columns[block.heads.start]
        if self._act.mode == "full":
            columns.add(place, part)
            return
        sinks = columns.advance(place, part) > self._act.bound(place)
        self._mass[block.batches, block.heads] += part.masked_fill(~sinks, 0.0).sum(dim=(-1, -2))

    def finish(self) -> Float[Tensor, "batch head"]:
        if self._act.mode == "causal":
            return self._mass
        parts = [self._columns[start].total for start in sorted(self._columns)]
        total = torch.cat([part[..., : self._n_keys] for part in parts], dim=1)
        keys = torch.arange(total.shape[-1], device=total.device)
        first, n_tokens = self._call.first_key[:, None], self._call.n_tokens[:, None]
        after = (first + n_tokens - keys).clamp(min=1)[:, None]
        judged = (keys > first if self._act.protect_first else keys >= first)[:, None]
        sinks = judged & (total / after * n_tokens[:, None] > self._act.alpha)
        return total.masked_fill(~sinks, 0.0).sum(dim=-1)


def _not_asked(*_: Any) -> Tensor:
    raise AssertionError("a statistic asks for neither scores nor means")
