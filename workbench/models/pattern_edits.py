"""Attention edits in pattern form, for backends that make whole patterns."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import AttentionEdit
from workbench.attention.rows import rows_of_call
from workbench.attention.whole import change_pattern


@dataclass
class PatternChange:
    """An attention edit on the patterns of one layer, over the steps of a generation."""

    edit: AttentionEdit
    first_key: Int[Tensor, " batch"] | None
    row_valid: Float[Tensor, "batch pos"] | None = None
    """1 for the prompts' real tokens, 0 for padding; None: all real."""
    seen: int = 0
    """Tokens the layer has been given, to notice a sliding cache that dropped the first."""

    def __call__(self, pattern: Tensor) -> Tensor:
        """Change ``[batch head q_pos k_pos]``."""
        batch, _, n_q, n_k = pattern.shape
        # As many queries as keys: a pass without a cache, which starts anew.
        self.seen = n_q if n_q == n_k else self.seen + n_q
        first = torch.zeros(1, dtype=torch.long) if self.first_key is None else self.first_key
        # Beams and several samples repeat each prompt's row.
        first = first.repeat_interleave(batch // first.shape[0]).to(pattern.device)
        dropped = max(0, self.seen - n_k)
        valid = None
        if self.row_valid is not None:
            valid = rows_of_call(self.row_valid.to(pattern.device), batch, n_q)
        # The keys that have left the window get no attention: they are put back as columns of 0.
        whole = torch.nn.functional.pad(pattern, (dropped, 0)) if dropped else pattern
        changed = change_pattern(self.edit, whole, first, valid, n_before=self.seen - n_q)
        return changed[..., dropped:]


def counted(
    change: Callable[[Tensor], Tensor], calls: Counter[str], name: str
) -> Callable[[Tensor], Tensor]:
    """Count how often a change was applied."""

    def run(x: Tensor) -> Tensor:
        calls[name] += 1
        return change(x)

    return run
