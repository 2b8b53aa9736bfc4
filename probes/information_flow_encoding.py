"""Encodings of one batch: the prompts, the empty prompt beside them, and patched forward passes.

A patch puts other vectors into the residual stream before block ``layer`` (``layer = n_layers``: at
the end, after the final norm) and runs what is left of the model. What is read is always the end, and
always as a difference from the empty prompt's encoding at the same position, so that position and the
directions common to all tokens drop out:

    r_I(S) = sum over i in the read positions of (end_i(S) - pad_i)

What any token adds to a pad is still common to all readings and says nothing of the item: its
direction, the mean of end - pad over prompts of random tokens, is taken out of every r.

Many patches run as one batch; the empty prompt is encoded once a length.
Paper: Kaplan et al. 2025, arXiv:2504.01137. Card: information_flow sections 1, 2 and 6.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.information_flow_items import Padding, Places
from workbench.interventions.replace import ReplacePositions
from workbench.models.base import ModelAdapter, Site

END = Site("ln_final")
"""After the final norm: what an image model, or the unembedding, is given."""

ROUNDING = 1e-5
"""Relative to the norm: differences below it are not read."""


def site_before(layer: int, n_layers: int) -> Site:
    """The place before block ``layer``; the end for ``n_layers``."""
    return END if layer == n_layers else Site("resid_pre", layer)


@dataclass
class PadEncodings:
    """Encodings of the empty prompt, kept by length."""

    model: ModelAdapter
    padding: Padding
    kept: dict[tuple[int, int | None], dict[Site, Tensor]] = field(default_factory=dict)
    n_runs: int = 0
    """Forward passes so far."""

    def get(
        self, tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"], site: Site
    ) -> Float[Tensor, "batch pos d_model"]:
        """The empty prompt's encoding beside every prompt; 0 past its length."""
        out = torch.zeros(*tokens.shape, self.model.spec.d_model)
        for row, length in enumerate(lengths.tolist()):
            out[row, :length] = self._one(int(tokens[row, 0]), length, site)
        return out

    def _one(self, first: int, length: int, site: Site) -> Float[Tensor, "pos d_model"]:
        begins = first if first == self.padding.bos else None
        known = self.kept.setdefault((length, begins), {})
        if site not in known:
            empty = self.padding.empty(first, length)[None]
            known[site] = self.model.capture(empty, [site])[site][0]
            self.n_runs += 1
        return known[site]


@dataclass(frozen=True)
class Encoded:
    """A batch of prompts and what its patches start from."""

    model: ModelAdapter
    layer: int
    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None
    places: Places
    pad_layer: Float[Tensor, "batch pos d_model"]
    pad_end: Float[Tensor, "batch pos d_model"]
    end: Float[Tensor, "batch pos d_model"]
    """Of the prompts as they are."""
    common: Float[Tensor, " d_model"] | None
    """The direction that all tokens share, of length 1; None: nothing is taken out."""
    read_prompt: bool
    """Read all real positions, not only an item's own."""
    rows_at_once: int

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Positions that are no padding of the batch."""
        if self.attention_mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.attention_mask.bool()

    def pools(self) -> Bool[Tensor, "batch item pos"]:
        """The positions at which every item is read."""
        own = self.places.mask()
        if not self.read_prompt:
            return own
        return self.real[:, None] & own.any(dim=-1, keepdim=True)

    def patched_end(
        self,
        prompts: Int[Tensor, " row"],
        keep: Bool[Tensor, "row pos"],
        replacement: Float[Tensor, "row pos d_model"],
        layer: int | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """The end after a patch: kept positions as in the prompt, the others as given."""
        n_layers = self.model.spec.n_layers
        layer = self.layer if layer is None else layer
        if layer == n_layers:
            return torch.where(keep[..., None], self.end[prompts], replacement)
        edit = ReplacePositions(str(site_before(layer, n_layers)), keep, replacement)
        mask = None if self.attention_mask is None else self.attention_mask[prompts]
        with self.model.edit(edit):
            return self.model.capture(self.tokens[prompts], [END], attention_mask=mask)[END]

    def read(
        self,
        prompts: Int[Tensor, " row"],
        keep: Bool[Tensor, "row pos"],
        replacement: Float[Tensor, "row pos d_model"] | None = None,
    ) -> Float[Tensor, "row item d_model"]:
        """What can be read of every item of the prompt after each patch; pads by default."""
        parts = []
        for rows in torch.arange(len(prompts)).split(self.rows_at_once):
            which = prompts[rows]
            other = self.pad_layer[which] if replacement is None else replacement[rows]
            end = self.patched_end(which, keep[rows] | ~self.real[which], other)
            parts.append(self.reading(end, which))
        return torch.cat(parts)

    def reading(
        self, end: Float[Tensor, "row pos d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "row item d_model"]:
        """Read every item of the prompt: r in the module's words."""
        read = pooled(self._beside_pads(end, prompts), self.pools()[prompts])
        return read if self.common is None else without_direction(read, self.common)

    def _beside_pads(
        self, end: Float[Tensor, "row pos d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "row pos d_model"]:
        """The difference from the empty prompt; 0 where it is no more than rounding."""
        pads = self.pad_end[prompts]
        difference = end - pads
        dtype = getattr(torch, self.model.dtype)
        floor = max(ROUNDING, 2 * torch.finfo(dtype).eps) * pads.norm(dim=-1, keepdim=True)
        # The direction of a rounding error would pass for a reading.
        return difference * (difference.norm(dim=-1, keepdim=True) > floor)

    def run(
        self, tokens: Int[Tensor, "row pos"], prompts: Int[Tensor, " row"], sites: list[Site]
    ) -> dict[Site, Tensor]:
        """Encode other tokens in the place of some prompts."""
        mask = None if self.attention_mask is None else self.attention_mask[prompts]
        found: dict[Site, Tensor] = self.model.capture(tokens, sites, attention_mask=mask)
        return found


def pooled(
    difference: Float[Tensor, "row pos d_model"], pool: Bool[Tensor, "row item pos"]
) -> Float[Tensor, "row item d_model"]:
    """Sum over the read positions; a cosine does not need their mean."""
    return torch.einsum("rip,rpd->rid", pool.float(), difference)


def without_direction(
    x: Float[Tensor, "... d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "... d_model"]:
    """Take the part along a direction of length 1 out."""
    return x - (x @ direction)[..., None] * direction


def common_direction(
    pads: PadEncodings, seed: int, *, n_prompts: int = 32, n_pos: int = 16
) -> Float[Tensor, " d_model"]:
    """The mean of end - pad over prompts of random tokens, of length 1; depends on the seed only."""
    spec, padding = pads.model.spec, pads.padding
    n_pos = min(n_pos, spec.n_ctx)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(spec.d_vocab, (n_prompts, n_pos), generator=generator)
    if padding.bos is not None:
        tokens[:, 0] = padding.bos
    lengths = torch.full((n_prompts,), n_pos)
    end = pads.model.capture(tokens, [END])[END] - pads.get(tokens, lengths, END)
    mean = end[:, 1:].mean(dim=(0, 1))
    return mean / mean.norm().clamp(min=1e-12)


def cosines(
    read: Float[Tensor, "row item d_model"], prototype: Float[Tensor, "row proto d_model"]
) -> Float[Tensor, "row item proto"]:
    """Cosine of what is read with every prototype; 0 where one of them is 0."""
    unit = [x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (read, prototype)]
    return torch.einsum("rid,rjd->rij", *unit)
