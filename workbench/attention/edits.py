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

from workbench.attention.streaming import AttentionInputs, PatternBlock, shows
from workbench.models.base import ModelSpec, Site

Factor = float | int | Float[Tensor, " head"]
"""What multiplies the scores on some keys: one number, or one for each head."""


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
        if self.first_key is None:
            return _first_products(self.inputs)
        return _products(self.inputs, self.first_key[:, None])[..., 0]

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
        scores = _capped_and_masked(inputs, products[..., None], factor, columns)[..., 0]
        # A row that sees nothing has an infinite log-sum: hidden too.
        return (self.log_sum - scores).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def first_values(self) -> Float[Tensor, "batch head d_value"]:
        """Value of the first key of every prompt, repeated for the query heads of each group."""
        if self.first_key is None:
            value, n_groups = self.inputs.value[:, :, 0].float(), self.inputs.n_groups
            return value if n_groups == 1 else value.repeat_interleave(n_groups, dim=1)
        return self.values(self.first_key[:, None])[:, :, 0]

    def weights(self, columns: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head q_pos n"]:
        """Attention of every query to some keys, exact: exp(score - log_sum)."""
        return torch.exp(self.scores(columns) - self.log_sum[..., None])

    def values(self, columns: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head n d_value"]:
        """Values of some keys, repeated for the query heads of each group."""
        return _picked(self.inputs.value, columns, self.inputs.n_groups)


def key_scores(
    inputs: AttentionInputs, columns: Int[Tensor, "batch n"], factor: Factor = 1
) -> Float[Tensor, "batch head q_pos n"]:
    """Scores on some keys, their raw scores times ``factor`` (as if the keys were), before softmax.

    Scaled and capped; -inf where a query must not see the key and where there is no such key.

    Args:
        inputs: Of the layer.
        columns: The keys of every prompt.
        factor: One number, or one for each head.
    """
    return _capped_and_masked(inputs, _products(inputs, columns), factor, columns)


def _products(
    inputs: AttentionInputs, columns: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch head q_pos n"]:
    key = _picked(inputs.key, columns, inputs.n_groups)
    return torch.einsum("bhqd,bhnd->bhqn", inputs.query.float(), key)


def _first_products(inputs: AttentionInputs) -> Float[Tensor, "batch head q_pos"]:
    """Products of every query with column 0: query heads of one group are rows of one product."""
    batch, n_heads, n_q, d_head = inputs.query.shape
    query = inputs.query.float().reshape(batch, inputs.key.shape[1], -1, d_head)
    key = inputs.key[:, :, :1].float().transpose(-1, -2)
    return torch.matmul(query, key).view(batch, n_heads, n_q)


def _capped_and_masked(
    inputs: AttentionInputs,
    products: Float[Tensor, "batch head q_pos n"],
    factor: Factor,
    columns: Int[Tensor, "batch n"] | None = None,
) -> Float[Tensor, "batch head q_pos n"]:
    """Scores from products with some keys; ``columns`` None: column 0 of all prompts."""
    if isinstance(factor, Tensor):
        factor = factor.to(products)[:, None, None]
    score = products * (inputs.scaling * factor)
    if inputs.softcap is not None:
        score = torch.tanh(score / inputs.softcap) * inputs.softcap
    if columns is None:
        if inputs.mask is None:
            return score  # the first key comes before every query
        picked, there = inputs.mask[..., :1], None
    else:
        n_q, n_k = inputs.query.shape[2], inputs.key.shape[2]
        there = ((columns >= 0) & (columns < n_k))[:, None, None]
        if inputs.mask is None:
            row = torch.arange(n_q, device=columns.device)[:, None] + inputs.offset
            seen = columns[:, None, None] <= row if inputs.causal else there
            return score.masked_fill(~(seen & there), -torch.inf)
        mask = inputs.mask.expand(columns.shape[0], -1, -1, -1)
        index = columns.clamp(0, n_k - 1)[:, None, None].expand(*mask.shape[:3], -1)
        picked = mask.gather(-1, index)
    if picked.dtype != torch.bool:
        score = score + picked
    seen = shows(picked) if there is None else shows(picked) & there
    # Hidden keys are dropped by where, not by a product: their score may overflow exp.
    return score.masked_fill(~seen, -torch.inf)


def _picked(x: Tensor, columns: Tensor, n_groups: int) -> Float[Tensor, "batch head n d"]:
    """Keys or values at some columns, float32, one for each query head."""
    rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
    picked = x.transpose(1, 2)[rows, columns.clamp(0, x.shape[2] - 1)]
    return picked.transpose(1, 2).float().repeat_interleave(n_groups, dim=1)


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
    checked: Callable[[AttentionCall, Tensor], Tensor | None] | None = None
    """``output`` where how accurate it is shows on the call alone: None, and tiles are changed."""
    gain: float = 1.0
    """At most how many times as large the rounding of z is in what ``output`` makes of it."""

    def uses_output(self, dtype: torch.dtype) -> bool:
        """Whether the output form is accurate in this precision: else tiles are changed, in float32."""
        return self.output is not None and self.gain <= largest_gain(dtype)

    @property
    def site(self) -> Site:
        """The pattern it changes."""
        return Site("pattern", self.layer)


def largest_gain(dtype: torch.dtype) -> float:
    """How much an output form may amplify the rounding of z: to 6e-6 of the values, or twice its own."""
    return 50.0 if dtype == torch.float32 else 2.0


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
