"""What one layer's attention is computed from."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.attention.scores import shows


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is computed from, as transformers hands it over."""

    query: Float[Tensor, "batch head q_pos d_head"]
    key: Float[Tensor, "batch kv_head k_pos d_head"]
    value: Float[Tensor, "batch kv_head k_pos d_value"]
    mask: Tensor | None
    """``[batch or 1, 1 or head, q_pos, k_pos]``: bool (True: visible) or added to the scores.
    None: causal, the last query at the last key."""
    scaling: float
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2)."""
    sinks: Float[Tensor, " head"] | None = None
    """Learned logits of a key that holds nothing (GPT-OSS); takes its share of every row."""
    causal: bool = True
    """With no mask: whether a query sees only keys up to its own position."""

    @property
    def n_groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query among the keys (more than 0 with a KV cache)."""
        return self.key.shape[2] - self.query.shape[2]

    def visible(self) -> Bool[Tensor, "#batch #head q_pos k_pos"]:
        """Which keys each query may see, whole: for references and small inputs."""
        n_q, n_k = self.query.shape[2], self.key.shape[2]
        if self.mask is not None:
            return shows(self.mask)[..., :n_k]
        if not self.causal:
            return torch.ones(1, 1, n_q, n_k, dtype=torch.bool, device=self.query.device)
        rows = torch.arange(n_q, device=self.query.device)[:, None] + self.offset
        return (torch.arange(n_k, device=self.query.device) <= rows)[None, None]
