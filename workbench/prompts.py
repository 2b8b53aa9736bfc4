"""Prompts as a model takes them: tokens, padding on the right, and their hash.

Reading is in ``workbench.sources`` and ``workbench.files``; here a tokenizer and a model's sizes
come in. Padding always ends up on the right, so position 0 is each prompt's first real token.
Importing this module does not import torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.encoding import Part, Request, encode
from workbench.provenance import canonical_json
from workbench.raw_prompts import RawPrompts, raw_hash
from workbench.sources import dataset_names, read_source

__all__ = [
    "Prompts",
    "RawPrompts",
    "columns_hash",
    "dataset_names",
    "describe",
    "raw_hash",
    "read_source",
    "tokenise",
    "tokens_hash",
]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one run, padded on the right."""

    tokens: Any
    """Int64 tensor ``[batch pos]``; 0 where padding is."""
    attention_mask: Any
    """Int64 tensor ``[batch pos]``, 1 where a token is; None: no padding."""
    texts: tuple[str, ...] | None
    """The whole texts, also of prompts that were cut; None: made from token ids."""
    source: str
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """One value a prompt: ``domain`` (data with domains), ``label`` (rows with a label)."""
    rows: tuple[dict[str, Any], ...] | None = None
    """The whole rows of the data, one a prompt; None: the data has no columns."""
    bos: str = "auto"
    n_left_out: int = 0
    """Prompts that were shorter than the wanted ``n_pos``."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt, without padding."""
        n_prompts, n_pos = map(int, self.tokens.shape)
        if self.attention_mask is None:
            return (n_pos,) * n_prompts
        return tuple(map(int, self.attention_mask.sum(dim=1)))


def tokenise(  # the settings of a run, all by name
    raw: RawPrompts,
    tokenizer: Any,
    spec: Any,
    *,
    seed: int = 0,
    bos: str = "auto",
    n_pos: int | None = None,
    min_pos: int = 1,
    report: Callable[[str], Any] | None = None,
) -> Prompts:
    """Turn prompts into tokens that the model takes; nothing is cut unless ``n_pos`` says so.

    Args:
        raw: From ``read_source``.
        tokenizer: A transformers tokenizer; None: only token ids can be used.
        spec: The model's ``ModelSpec``.
        seed: For drawn prompts (``random``, ``repeat``).
        bos: ``auto``: as the tokenizer does (ids stay as given); ``always``: put once in front
            where it is not; ``never``: no special tokens are added, a leading one is taken off.
        n_pos: Cut prompts to so many tokens and leave the shorter ones out; None: whole prompts.
        min_pos: The shortest prompt that makes sense to the probe.
        report: Told in one line when prompts were left out.

    Raises:
        DataError: Texts without a tokenizer, ids outside the vocabulary, prompts too long or
            too short.
        ConfigError: An impossible ``bos`` or ``n_pos``.
    """
    request = Request(tokenizer, spec, seed, bos, n_pos, min_pos)
    request.check()
    domains = raw.domains or {"": raw}
    parts = [
        encode(part, request, index, f"{part.source} ({name})" if name else part.source)
        for index, (name, part) in enumerate(domains.items())
    ]
    left_out = sum(len(part.ids) - len(part.kept) for part in parts)
    if left_out and report:
        total = sum(len(part.ids) for part in parts)
        report(f"{left_out} of {total} prompts have fewer than {n_pos} tokens and are left out")
    return _pack(parts, raw, bos, left_out)


def _pack(parts: list[Part], raw: RawPrompts, bos: str, left_out: int) -> Prompts:
    ids = [part.ids[index] for part in parts for index in part.kept]
    tokens, mask = _pad(ids)
    labels: dict[str, tuple[str, ...]] = {}
    if raw.domains:
        names = zip(raw.domains, parts, strict=True)
        labels["domain"] = tuple(name for name, part in names for _ in part.kept)
    rows = _gather(parts, "rows")
    if rows and all("label" in row for row in rows):
        labels["label"] = tuple(str(row["label"]) for row in rows)
    return Prompts(tokens, mask, _gather(parts, "texts"), raw.source, labels, rows, bos, left_out)


def _gather(parts: list[Part], name: str) -> tuple[Any, ...] | None:
    """The kept texts or rows of all parts; None when a part has none."""
    if not all(getattr(part.raw, name) for part in parts):
        return None
    return tuple(getattr(part.raw, name)[index] for part in parts for index in part.kept)


def _pad(ids: list[Any]) -> tuple[Any, Any]:
    """Put prompts into one tensor, padded on the right with 0, and make its mask."""
    import torch

    lengths = torch.tensor([len(tokens) for tokens in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for index, prompt in enumerate(ids):
        tokens[index, : len(prompt)] = torch.tensor(prompt)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return tokens, None if mask.all() else mask


def tokens_hash(prompts: Prompts) -> str:
    """SHA-256 of shape, ids (64-bit little-endian) and mask; the side of padding is no part."""
    import numpy as np

    tokens = prompts.tokens.cpu().numpy()
    mask = prompts.attention_mask
    kept = np.ones_like(tokens) if mask is None else mask.cpu().numpy()
    digest = hashlib.sha256(canonical_json(list(tokens.shape)))
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(kept, dtype="u1").tobytes())
    return digest.hexdigest()


def columns_hash(prompts: Prompts) -> str | None:
    """SHA-256 of what prompts carry beside their tokens (labels, rows); None: nothing.

    A probe that reads domains or items gives other numbers when these change and the tokens
    do not, so a result's key needs both hashes.
    """
    if not prompts.labels and not prompts.rows:
        return None
    return hashlib.sha256(canonical_json([prompts.labels, prompts.rows])).hexdigest()


def describe(prompts: Prompts) -> dict[str, Any]:
    """What provenance says of the prompts; JSON data."""
    lengths = prompts.lengths
    return {
        "source": prompts.source,
        "n_prompts": len(lengths),
        "n_left_out": prompts.n_left_out,
        "n_pos_min": min(lengths),
        "n_pos_max": max(lengths),
        "bos": prompts.bos,
        "hash": tokens_hash(prompts),
    }
