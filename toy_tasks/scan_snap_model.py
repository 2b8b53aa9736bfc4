"""A trained scan-snap as a model of tokens, so that probes, hooks and edits work on it.

Tokens are one-hot vectors, and the free matrices Y and Z (see ``scan_snap_dynamics``) are the
weights of one head as wide as the vocabulary:

    resid_pre = onehot(x),  q_t = sqrt(M) Z[x_t],  k_s = v_s = onehot(x_s),  W_O = 1
    attn_scores[t, s] = q_t k_s / sqrt(M) = Z[x_t, x_s]      for s < t
    resid_mid = resid_post = z_t = a,  ln_final = f = a / |a|,  logits = f Y

What differs from a transformer: a query does not attend to itself, so the first position sees
nothing: its row of the pattern is 0 and its logits are 0. There is no residual connection, no
position and no MLP. Z has been learned for the query tokens; from another token attention is even,
and what is predicted there means nothing.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toy_tasks.model import NORMALISED, WHOLE_PATTERN, Output, Tap, leave
from toy_tasks.scan_snap_data import ScanSnapConfig
from workbench.models.base import Site

__all__ = ["NORMALISED", "WHOLE_PATTERN", "ScanSnapModel", "model_from", "n_learned_keys"]

LONGEST = 4096
"""Tokens. Attention has no positions, so this only bounds the memory that a pattern takes."""


@dataclass(frozen=True)
class ScanSnapSizes:
    """The sizes an adapter asks for."""

    d_vocab: int
    first_query: int
    """The id of the first query token."""
    n_queries: int
    n_ctx: int
    n_layers: int = 1
    n_heads: int = 1
    d_mlp: int = 0
    positions: str = "none"
    attention: str = "softmax"
    bias: str = "none"

    @property
    def d_model(self) -> int:
        """Width of the residual stream: tokens are one-hot."""
        return self.d_vocab

    @property
    def d_head(self) -> int:
        """Width of the only head."""
        return self.d_vocab


class ScanSnapModel(nn.Module):
    """Tokens to logits; see the module's docstring."""

    def __init__(self, config: ScanSnapSizes) -> None:
        super().__init__()
        self.config = config
        self.Y = nn.Parameter(torch.zeros(config.d_vocab, config.d_vocab, dtype=torch.float64))
        self.Z = nn.Parameter(torch.zeros(config.n_queries, config.d_vocab, dtype=torch.float64))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        tap: Tap = leave,
    ) -> Output:
        """Predict the next token at every position; ``position_ids`` change nothing."""
        x = nn.functional.one_hot(tokens, self.config.d_vocab).to(self.Y)
        x = tap(Site("resid_pre", 0), tap(Site("embed"), x))
        a = tap(Site("resid_mid", 0), self._attend(x, attention_mask, tap))
        a = tap(Site("resid_post", 0), a)
        return Output(tap(Site("ln_final"), self.ln_final(a)) @ self.Y)

    def ln_final(self, a: Float[Tensor, "*batch token"]) -> Float[Tensor, "*batch token"]:
        """Normalise to f. Where nothing was seen a is 0; there f is 0 too, and every token as likely."""
        return a / a.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)

    def _attend(self, x: Tensor, attention_mask: Tensor | None, tap: Tap) -> Tensor:
        q = x[:, :, None] @ self.queries()
        q, k, v = tap(Site("q", 0), q), tap(Site("k", 0), x[:, :, None]), x[:, :, None]
        v = tap(Site("v", 0), v)
        visible = keys_before(x.shape[1], attention_mask, x.device)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.config.d_head**0.5
        scores = tap(Site("attn_scores", 0), scores.masked_fill(~visible, -torch.inf))
        # softmax of nothing would be NaN, in the gradient too
        seen = scores.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
        pattern = tap(Site(WHOLE_PATTERN, 0), seen.softmax(dim=-1) * visible)
        pattern = tap(Site("pattern", 0), pattern)
        z = tap(Site("z", 0), torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return tap(Site("attn_out", 0), z.flatten(2))

    def queries(self) -> Float[Tensor, "token token"]:
        """W_Q: the rows of Z at the ids of the queries, times sqrt(M); 0 elsewhere."""
        first, end = self.config.first_query, self.config.first_query + self.config.n_queries
        rows = self.Z * self.config.d_head**0.5
        return nn.functional.pad(rows, (0, 0, first, self.config.d_vocab - end))

    # Weights by the names of a transformer's parts

    @property
    def embed(self) -> SimpleNamespace:
        """One-hot."""
        return _holder(torch.eye(self.config.d_vocab).to(self.Y))

    @property
    def unembed(self) -> SimpleNamespace:
        """Y, as the weight of a linear map."""
        return _holder(self.Y.T)

    @property
    def blocks(self) -> list[SimpleNamespace]:
        """The one layer, as weights of linear maps."""
        one = torch.eye(self.config.d_vocab).to(self.Y)
        attention = SimpleNamespace(
            W_Q=_holder(self.queries().T), W_K=_holder(one), W_V=_holder(one), W_O=_holder(one)
        )
        return [SimpleNamespace(attention=attention)]


def _holder(weight: Tensor) -> SimpleNamespace:
    return SimpleNamespace(weight=weight)


def keys_before(n_pos: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """``[batch or 1, 1, q_pos, k_pos]``: keys strictly before the query that are no padding."""
    before = torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril(-1)[None, None]
    if attention_mask is None:
        return before
    return before & attention_mask.to(device)[:, None, None].bool()


def n_learned_keys(config: ScanSnapSizes) -> int:
    """Columns of the whole pattern that belong to no token: none."""
    return 0


def model_from(described: dict[str, Any]) -> ScanSnapModel:
    """Make an empty model from the config.json of a run."""
    names = ScanSnapConfig.__dataclass_fields__
    run = ScanSnapConfig(**{name: described[name] for name in names if name in described})
    longest = max(LONGEST, run.n_pos)
    return ScanSnapModel(ScanSnapSizes(run.n_tokens, run.n_context, run.n_queries, longest))
