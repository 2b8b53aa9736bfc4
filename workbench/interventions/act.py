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

from workbench.attention.edits import AttentionEdit, Edit, RowCall, TiledCall
from workbench.attention.scores import wide
from workbench.attention.streaming import (
    PatternBlock,
)
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.interventions.columns import EVERY, Columns
from workbench.interventions.running_columns import Place, RunningColumns
from workbench.models.base import ModelSpec
from workbench.settings import check_settings, setting

MOST_OF_A_ROW = 0.9
"""Up to here 1 - m is as good as the sum of what is no sink; above, rounding would grow tenfold."""
SMALLEST = 1e-38
"""A row with less than this on what is no sink sees nothing but sinks: its quotients would overflow."""


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
        sums = RunningColumns()
        # All heads are not picked out: copies of a tile cost as much as its softmax.
        picked = slice(None) if heads is None else heads

        def begin(call: TiledCall) -> Callable[[PatternBlock], Tensor]:
            """What changes the tiles of one call; the sums of a generation begin anew or go on."""
            sums.open(call)
            # A decoded token comes after the prompt: for it, all rows are those up to itself.
            ahead = self.mode == "full" and call.n_before <= 0
            whole = self._sinks_of_all_rows(call)[:, picked] if ahead else None

            def change(block: PatternBlock) -> Tensor:
                """The tile ``batch head q_pos k_pos``, with its sinks damped, in its own dtype."""
                part = wide(block.pattern[:, picked])
                place = Place(call, block)
                before, after = sums.add(place, part)
                if whole is None:
                    keys = Columns.where(after > self.least_bound(place))
                    some = sums.received(keys.of(before), keys.of(part), block)
                    sinks = some > self.bound(place, keys)
                else:
                    here = whole[block.batches, :, block.columns]
                    keys = Columns.where(here)
                    sinks = keys.of(here)[:, :, None]
                outside = None if block.outside is None else block.outside[:, picked]
                damped = damp_keys(part, keys, sinks, self.beta, outside=outside)
                damped = damped.to(block.pattern.dtype)
                if heads is None:
                    return damped
                edited = block.pattern.clone()
                edited[:, heads] = damped
                return edited

            return change

        def row(call: RowCall, pattern: Tensor, outside: Tensor | None) -> Tensor:
            """The one row ``batch head one k_pos`` of a decoded token, damped."""
            if heads is None:
                return self._damp_row(call, sums, pattern, outside)
            edited = pattern.clone()
            others = None if outside is None else outside[:, heads]
            edited[:, heads] = self._damp_row(call, sums, pattern[:, heads], others)
            return edited

        return AttentionEdit(layer, None, None, begin, sums.reorder, row=row)

    def _damp_row(
        self,
        call: RowCall,
        sums: RunningColumns,
        part: Float[Tensor, "batch head one k_pos"],
        outside: Float[Tensor, "batch head one"] | None,
    ) -> Float[Tensor, "batch head one k_pos"]:
        """The rule for a decoded token, alike in both modes."""
        n_keys = part.shape[-1]
        # From the first key in the cache, as columns count.
        row = call.n_before - call.first_column
        rule, place = (self.alpha, self.protect_first), (call.first_key, n_keys, row, part.device)
        bound = call.shared.get("act", _row_bound, *rule, *place)
        received = sums.follow(part, call.first_column)
        return damp(part, received > bound, self.beta, outside=outside)

    def bound(self, place: Place, keys: Columns = EVERY) -> Float[Tensor, "batch one q_pos n"]:
        """What a key of each row must have received so far to be a sink: alpha / n times its rows.

        Infinite for keys that are not judged. One comparison with it, alike for all heads, stands for
        a mean, a product and a mask of every head's tile.

        Args:
            place: Of the tile.
            keys: Which of its columns.
        """
        return self._bound(place, keys.of(place.keys), place.rows)

    def least_bound(self, place: Place) -> Float[Tensor, "batch one k_pos"]:
        """The least that ``bound`` is for each key in the tile: it grows from row to row.

        Nor does what a key has received shrink: one that has less at the tile's end is no sink in it.
        """
        keys = place.keys
        return self._bound(place, keys, torch.maximum(place.rows[0], keys))[:, :, 0]

    def _bound(
        self, place: Place, keys: Int[Tensor, " n"], rows: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "batch one q_pos n"]:
        n_rows = (rows - keys + 1).clamp(min=1)
        bound = n_rows * (self.alpha / (rows - place.first + 1).clamp(min=1))
        judged = keys > place.first if self.protect_first else keys >= place.first
        return bound.masked_fill(~judged, torch.inf)

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


def damp_keys(
    pattern: Float[Tensor, "batch head q_pos k_pos"],
    keys: Columns,
    sinks: Bool[Tensor, "batch head #q_pos n"],
    beta: float,
    *,
    outside: Float[Tensor, "batch head q_pos"] | None = None,
) -> Float[Tensor, "batch head q_pos k_pos"]:
    """``damp`` where all sinks are among a few ``keys``: the others are read and written once.

    Args:
        pattern: After softmax; rows sum to 1 (with ``outside``) or are 0.
        keys: Columns that may be sinks.
        sinks: Which of them are, by row.
        beta: The factor on them.
        outside: What each row gives to a learned sink that is no key.
    """
    if not sinks.shape[-1]:
        return pattern
    some = keys.of(pattern)
    on_sinks = torch.where(sinks, some, 0.0)
    damped = on_sinks.sum(dim=-1, keepdim=True)
    most = float(damped.max())
    if most == 0.0:
        return pattern
    if most > MOST_OF_A_ROW:
        everywhere = sinks.new_zeros(pattern.shape)
        keys.put(everywhere, sinks.expand(some.shape))
        return damp(pattern, everywhere, beta, outside=outside)
    grown = 1.0 + (1.0 - beta) * damped / (1.0 - damped)
    edited = pattern * grown
    keys.put(edited, torch.where(sinks, beta * some, some * grown))
    return edited


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
    freed = (rest >= SMALLEST).to(rest) * (1.0 - beta)
    gain = freed * on_sinks.sum(dim=-1, keepdim=True) / rest.clamp(min=SMALLEST)
    return torch.addcmul(pattern, on_sinks, freed, value=-1.0).addcmul_(on_rest, gain)
