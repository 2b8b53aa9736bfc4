"""What an intervention asks of the forward pass, in terms every backend understands.

An intervention says what it changes with ``plan(spec)``: a list of edits, empty when it would
change nothing, so that a no-op runs the stock model, bit for bit. Backends carry the plan out:

* ``AttentionEdit`` has two exact forms of one change. ``output`` works after a fused kernel,
  from the layer's inputs, its output z and the rows' log-sum-exp; ``pattern`` is the plain
  definition on the pattern, for backends that make one, and the reference of the tests.
* ``ActivationEdit`` changes the activation at one site, ``z`` or a residual-stream site.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.inputs import AttentionInputs
from workbench.attention.key_scores import (
    Factor,
    capped_and_masked,
    first_key_products,
    key_scores,
    picked_keys,
)
from workbench.attention.scores import wide
from workbench.attention.shared import Shared
from workbench.attention.streaming import PatternBlock
from workbench.models.base import ModelSpec, Site


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as an edit in output form sees it."""

    layer: int
    inputs: AttentionInputs
    log_sum: Float[Tensor, "batch head q_pos"]
    """Log of every row's softmax normaliser."""
    first_key: Int[Tensor, " batch"] | None
    """Index of each prompt's first real token among the keys; None: 0 for all; below 0: it has
    left a sliding window's cache."""
    first_column: int = 0
    """Position of the first key: above 0 where a sliding window's cache has let keys go."""

    def first_key_index(self) -> Int[Tensor, " batch"]:
        """The first attended key of every prompt."""
        if self.first_key is not None:
            return self.first_key
        return torch.zeros(
            self.inputs.key.shape[0], dtype=torch.long, device=self.inputs.key.device
        )

    def columns(self, positions: Sequence[int]) -> Int[Tensor, "batch n"]:
        """Where the keys of some positions of every prompt are; outside the keys if not there."""
        first = self.first_key_index()
        return first[:, None] + torch.tensor(positions, device=first.device)

    def scores(
        self, columns: Int[Tensor, "batch n"], factor: Factor = 1
    ) -> Float[Tensor, "batch head q_pos n"]:
        """Scores of every query on some keys times ``factor``, capped; -inf where hidden."""
        return key_scores(self.inputs, columns, factor)

    def first_products(self) -> Float[Tensor, "batch head q_pos"]:
        """Products of every query with the first key of its prompt, before any scale."""
        return first_key_products(self.inputs, self.first_key)

    def surprise(
        self, products: Float[Tensor, "batch head q_pos"], factor: Factor = 1
    ) -> Float[Tensor, "batch head q_pos"]:
        """-log of the weight that the first key has if its products are ``factor`` times these.

        The row's normaliser is that of the weights as they are; infinite where the key is hidden.
        """
        inputs = self.inputs
        if inputs.softcap is None and inputs.mask is None and self.first_key is None:
            # The first key comes before every query: two passes over the rows less.
            if isinstance(factor, Tensor):
                return self.log_sum - products * (inputs.scaling * factor.to(products))[:, None]
            return torch.sub(self.log_sum, products, alpha=inputs.scaling * factor)
        columns = None if self.first_key is None else self.first_key[:, None]
        scores = capped_and_masked(inputs, products[..., None], factor, columns)[..., 0]
        # A row that sees nothing has an infinite log-sum: hidden too.
        return (self.log_sum - scores).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def first_values(self) -> Float[Tensor, "batch head d_value"]:
        """Value of the first key of every prompt, repeated for the query heads of each group."""
        if self.first_key is None:
            value, n_groups = wide(self.inputs.value[:, :, 0]), self.inputs.n_groups
            return value if n_groups == 1 else value.repeat_interleave(n_groups, dim=1)
        return self.values(self.first_key[:, None])[:, :, 0]

    def weights(self, columns: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head q_pos n"]:
        """Attention of every query to some keys, exact: exp(score - log_sum)."""
        return torch.exp(self.scores(columns) - self.log_sum[..., None])

    def values(self, columns: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head n d_value"]:
        """Values of some keys, repeated for the query heads of each group."""
        return picked_keys(self.inputs.value, columns, self.inputs.n_groups)


@dataclass(frozen=True)
class TiledCall:
    """One call of a layer's attention, as an edit of its tiles sees it.

    The tiles of a prompt come in the order of their rows.
    """

    n_before: int
    """Tokens that the layer was given in earlier calls of the same generation: the position of the
    first row."""
    first_column: int
    """Position of the first key: above 0 where a sliding window's cache has let keys go, below 0
    where learned keys stand before the prompt's."""
    first_key: Int[Tensor, " batch"]
    """Column of each prompt's first real token; below 0: it has left the cache."""
    n_tokens: Int[Tensor, " batch"]
    """Real tokens of each prompt, up to the end of this call."""
    scores: Callable[[Tensor, Factor], Tensor]
    """(columns [batch n], factor) -> [batch head q_pos n]: see ``key_scores``; a backend that hands
    over patterns alone refuses."""
    column_mean: Callable[[], Tensor]
    """Makes ``[batch head k_pos]``: the mean attention that each key receives in this call, after
    the edits before this one."""


@dataclass(frozen=True)
class RowCall:
    """One new query of a layer behind a cache."""

    inputs: AttentionInputs
    n_before: int
    """Position of the query; above 0."""
    first_column: int
    """Position of the first key: above 0 where a sliding window's cache has let keys go."""
    first_key: Int[Tensor, " batch"] | None
    """Column of each prompt's first real token; None: 0 for all; below 0: it has left the cache."""
    shared: Shared


@dataclass(frozen=True)
class AttentionEdit:
    """An exact change of one layer's attention, in both forms."""

    layer: int
    output: Callable[[AttentionCall, Tensor], Tensor] | None
    """(call, z [batch q_pos head d_value]) -> z; None: there is no output form, tiles are changed."""
    pattern: Callable[[Tensor, Tensor], Tensor] | None
    """(pattern [batch head q_pos k_pos], first key of each prompt [batch]) -> pattern."""
    begin: "Callable[[TiledCall], Callable[[PatternBlock], Tensor]] | None" = None
    """``pattern`` tile by tile, for edits that depend on where a row stands or on earlier rows: told
    of each call of the layer, it returns what makes a tile's pattern anew. Takes the place of
    ``pattern`` where that is None."""
    reorder: Callable[[Int[Tensor, " batch"]], None] | None = None
    """Takes what the edit remembers of earlier rows along when beam search puts other rows in their
    place; None: it remembers nothing."""
    first_key_bias: Float[Tensor, " head"] | None = None
    """Set where the whole edit is this on the first key's score, so that a kernel may add it itself."""
    first_key_change: Callable[[RowCall], Tensor] | None = None
    """The same where it is another number for every query: [batch head], for one new query."""
    row: Callable[[RowCall, Tensor, Tensor | None], Tensor] | None = None
    """(call, pattern [batch head 1 k_pos], what goes to a learned sink [batch head 1]) -> pattern: the
    edit of one new query's row, for edits that need the pattern."""
    checked: Callable[[AttentionCall, Tensor], Tensor | None] | None = None
    """``output`` where how accurate it is shows on the call alone: None, and tiles are changed."""
    gain: float = 1.0
    """At most how many times as large the rounding of z is in what ``output`` makes of it."""

    def uses_output(self, dtype: torch.dtype) -> bool:
        """Whether the output form is accurate in this precision: else tiles are changed."""
        return self.output is not None and self.gain <= largest_gain(dtype)

    @property
    def is_on_first_key(self) -> bool:
        """Whether the whole edit adds something to the score of the first key."""
        return self.first_key_bias is not None or self.first_key_change is not None

    def added_to_first_key(self, call: RowCall) -> Float[Tensor, "*batch head"]:
        """What one new query's score on the first key gains."""
        if self.first_key_bias is not None:
            return self.first_key_bias
        assert self.first_key_change is not None  # asked of edits on the first key
        return self.first_key_change(call)

    @property
    def site(self) -> Site:
        """The pattern it changes."""
        return Site("pattern", self.layer)


def largest_gain(dtype: torch.dtype) -> float:
    """How much an output form may amplify the rounding of z: to 6e-6 of the values, or twice its own."""
    return 50.0 if dtype in (torch.float32, torch.float64) else 2.0


@dataclass(frozen=True)
class ActivationEdit:
    """A change of the activation at one site."""

    site: Site
    change: Callable[[Tensor], Tensor]
    """``z`` is ``[batch pos head d_head]``, the rest ``[batch pos d_model]``."""


Edit = AttentionEdit | ActivationEdit


@runtime_checkable
class Intervention(Protocol):
    """A named, parametrised change of a model's forward pass.

    One that is not defined under every way of generating may have a method
    ``check_generation(options)``, given the sampling arguments, that raises ``ConfigError``.
    """

    name: str

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """The edits on a model of these sizes; empty when nothing would change.

        Raises:
            ConfigError: The model has no such layer or head.
        """
        ...


EDITABLE_SITES = frozenset(
    {"z", "embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "ln_final"}
)


def plan_all(interventions: Sequence[Intervention], spec: ModelSpec) -> list[Edit]:
    """The edits of several interventions, in the order in which they apply."""
    return [edit for intervention in interventions for edit in intervention.plan(spec)]
