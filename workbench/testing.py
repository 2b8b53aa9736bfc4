"""Models with planted attention, for tests of probes; public, for third parties' probes too.

A planted model has the patterns, values and residual stream that it is given, so what a probe
must find is known. It varies by prompt: prompt ``i`` of a batch sees ``pattern[i]``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.attention.streaming import PatternStatistic
from workbench.attention.whole import statistics_of_pattern
from workbench.errors import CapabilityError
from workbench.models.base import (
    ATTENTION_SITES,
    Captured,
    ModelSpec,
    Reducers,
    Site,
    reduction_for,
)


def sink_pattern(n_pos: int, pos: int = 0) -> Float[Tensor, "q_pos k_pos"]:
    """Every query attends to ``pos`` alone; those before it to themselves."""
    rows = torch.arange(n_pos)
    return torch.nn.functional.one_hot(torch.where(rows < pos, rows, pos), n_pos).float()


def uniform_pattern(n_pos: int) -> Float[Tensor, "q_pos k_pos"]:
    """Every query attends equally to every key it sees: A[t, k] = 1/(t + 1)."""
    return torch.tril(torch.ones(n_pos, n_pos)) / torch.arange(1, n_pos + 1)[:, None]


def identity_pattern(n_pos: int) -> Float[Tensor, "q_pos k_pos"]:
    """Every query attends to itself."""
    return torch.eye(n_pos)


class PlantedModel:
    """A model whose attention patterns are given; see ``workbench.models.base.ModelAdapter``."""

    backend = "planted"
    capabilities = frozenset({"capture", "attention", "patterns", "streaming", "weights"})
    tokenizer = None
    dtype = "float32"
    attention = "planted"
    interventions: tuple[Any, ...] = ()

    def __init__(
        self,
        pattern: Float[Tensor, "batch layer head q_pos k_pos"],
        sites: Mapping[str, Float[Tensor, "batch pos ..."]] | None = None,
        *,
        d_head: int = 4,
        seed: int = 0,
    ) -> None:
        """Plant patterns; other sites are as given, or random numbers that depend on the seed.

        Args:
            pattern: One pattern a prompt, layer and head.
            sites: Activations by site text, e.g. ``{"L0.v": ..., "L1.resid_post": ...}``.
            d_head: Size of the random heads.
            seed: Of the random numbers.
        """
        self.pattern = pattern
        self.sites = {Site.parse(name): x for name, x in (sites or {}).items()}
        self._seed = seed
        n_layers, n_heads, n_pos = pattern.shape[1], pattern.shape[2], pattern.shape[-1]
        d_model = n_heads * d_head
        self.spec = ModelSpec(
            name="planted",
            revision=f"seed-{seed}",
            family="planted",
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_model=d_model,
            d_head=d_head,
            d_mlp=4 * d_model,
            d_vocab=100,
            n_ctx=n_pos,
            positions="none",
        )

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[Site | str],
        reduce: Reducers = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Return what was planted for the first ``batch`` prompts."""
        captured = Captured()
        for site in map(Site.parse, sites):
            reduction = reduction_for(site, reduce)
            if isinstance(reduction, PatternStatistic | Mapping):
                valid = None if attention_mask is None else attention_mask.float()
                several = reduction if isinstance(reduction, Mapping) else {"": reduction}
                found = statistics_of_pattern(self._activation(site, tokens), several, valid)
                captured[site] = found if isinstance(reduction, Mapping) else found[""]
            else:
                activation = self._activation(site, tokens)
                captured[site] = activation if reduction is None else reduction(activation)
        return captured

    def _activation(self, site: Site, tokens: Tensor) -> Tensor:
        batch, n_pos = tokens.shape
        if site.name == "pattern":
            return self.pattern[:batch, site.layer, :, :n_pos, :n_pos]
        if site in self.sites:
            return self.sites[site][:batch, :n_pos]
        by_head = site.name in ATTENTION_SITES
        last = (self.spec.n_heads, self.spec.d_head) if by_head else (self.spec.d_model,)
        generator = torch.Generator().manual_seed(hash((self._seed, str(site))) % 2**31)
        return torch.randn(batch, n_pos, *last, generator=generator)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Random logits that depend on the seed."""
        generator = torch.Generator().manual_seed(self._seed)
        logits = torch.randn(*tokens.shape, self.spec.d_vocab, generator=generator)
        return logits if last is None else logits[:, -last:]

    @contextmanager
    def edit(self, *interventions: Any) -> Iterator[None]:
        """Refuse: what is planted cannot be edited."""
        raise CapabilityError(
            "a planted model has no forward pass to edit; use a real or toy model"
        )
        yield

    def continue_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Refuse: there is no forward pass to go on with."""
        raise CapabilityError("a planted model has no forward pass; use a real or toy model")

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Refuse: there is nothing to generate with."""
        raise CapabilityError("a planted model cannot generate; use a real or toy model")

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """Orthonormal rows: ``|v W_O| = |v|``.

        Raises:
            CapabilityError: Any other weight than W_O.
        """
        if name != "W_O":
            raise CapabilityError(f"a planted model has W_O only; got {name}")
        eye = torch.eye(self.spec.d_model)
        return eye.unflatten(0, (self.spec.n_heads, self.spec.d_head))
