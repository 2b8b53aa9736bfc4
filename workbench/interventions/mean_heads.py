"""Mean ablation: a head's output z is the same at every position and in every prompt.

    z'[h] = mean of z[h] over the tokens of a reference text

Unlike zeroing, it leaves what the head writes everywhere alike. The means may come from a file:
safetensors with one tensor ``mean [heads d_head]``; ``mean_z`` makes them from prompts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.edits import ActivationEdit, Edit
from workbench.errors import ConfigError
from workbench.interventions.base import Heads, heads_by_layer
from workbench.interventions.tensor_file import read_tensor
from workbench.models.base import ModelAdapter, ModelSpec, Site


@dataclass(frozen=True, eq=False)
class MeanHeads:
    """Set the output z of some heads (before W_O) to fixed vectors, at every position."""

    heads: Heads
    mean: Float[Tensor, "heads d_head"] | str
    """One vector a head, in the order of ``heads``, or a safetensors file that holds them."""
    name: str = "mean-heads"

    def __post_init__(self) -> None:
        """Read the file, if it is one.

        Raises:
            DataError: The file cannot be read, or its tensor is not one of numbers.
            ConfigError: A head twice.
        """
        object.__setattr__(self, "heads", tuple((layer, head) for layer, head in self.heads))
        if len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"heads must be different; got {self.heads}; name each head once")
        if isinstance(self.mean, str):
            object.__setattr__(self, "mean", read_tensor(self.mean, "mean"))

    def plan(self, spec: ModelSpec) -> list[Edit]:
        """One edit a layer.

        Raises:
            ConfigError: Not one vector a head.
        """
        assert isinstance(self.mean, Tensor)
        if tuple(self.mean.shape) != (len(self.heads), spec.d_head):
            raise ConfigError(
                f"mean must be [heads d_head] = {[len(self.heads), spec.d_head]}; got "
                f"{list(self.mean.shape)}; give one vector a head"
            )
        return [
            ActivationEdit(Site("z", layer), self._replace(layer, heads))
            for layer, heads in heads_by_layer(self.heads, spec).items()
        ]

    def _replace(self, layer: int, heads: list[int]):  # type: ignore[no-untyped-def]
        assert isinstance(self.mean, Tensor)
        rows = torch.stack([self.mean[self.heads.index((layer, head))] for head in heads])

        def change(
            z: Float[Tensor, "batch pos head d_head"],
        ) -> Float[Tensor, "batch pos head d_head"]:
            edited = z.clone()
            edited[:, :, heads] = rows.to(z)
            return edited

        return change


def mean_z(
    model: ModelAdapter,
    batches: Iterable[tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"] | None]],
    heads: Heads,
) -> Float[Tensor, "heads d_head"]:
    """Mean of z over the real tokens of some prompts, one vector a head.

    Args:
        model: Its z is read as it is now, under whatever edits are active.
        batches: Tokens and masks, one batch at a time.
        heads: (layer, head) pairs.

    Raises:
        ConfigError: No batches.
    """
    layers = sorted({layer for layer, _ in heads})
    total = torch.zeros(len(heads), model.spec.d_head, dtype=torch.float64)
    n_tokens = 0.0
    for tokens, mask in batches:
        weight = torch.ones_like(tokens) if mask is None else mask

        def summed(z: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.einsum("bphd,bp->hd", z.double(), weight.to(z.device).double())

        found = model.capture(tokens, [Site("z", n) for n in layers], summed, attention_mask=mask)
        total += torch.stack([found[Site("z", layer)][head] for layer, head in heads])
        n_tokens += float(weight.sum())
    if not n_tokens:
        raise ConfigError("a mean needs at least one prompt; got none")
    return (total / n_tokens).float()
