"""Prompts as a model takes them: tokens, padding on the right, and their hash.

Reading is in ``workbench.sources`` and ``workbench.files``; here a tokenizer and a model's sizes
come in. Padding always ends up on the right, so position 0 is each prompt's first real token.
Importing this module does not import torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import ConfigError, DataError
from workbench.provenance import canonical_json
from workbench.raw_prompts import RawPrompts, raw_hash
from workbench.sources import dataset_names, read_source

__all__ = [
    "Prompts",
    "RawPrompts",
    "dataset_names",
    "describe",
    "raw_hash",
    "read_source",
    "tokenise",
    "tokens_hash",
]

BOS_POLICIES = ("auto", "always", "never")
DRAWN_PROMPTS = 100
DRAWN_TOKENS = 64


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


@dataclass(frozen=True)
class _Request:
    """What ``tokenise`` was asked for."""

    tokenizer: Any
    spec: Any
    seed: int
    bos: str
    n_pos: int | None
    min_pos: int

    def check(self) -> None:
        n_ctx, n_pos = self.spec.n_ctx, self.n_pos
        if self.bos not in BOS_POLICIES:
            raise ConfigError(f"bos must be one of {', '.join(BOS_POLICIES)}; got {self.bos!r}")
        if n_pos is not None and not 1 <= n_pos <= n_ctx:
            raise ConfigError(
                f"n_pos must be between 1 and the {n_ctx} tokens that {self.spec.name} takes; "
                f"got {n_pos}"
            )
        if n_pos is not None and n_pos < self.min_pos:
            raise ConfigError(f"n_pos must be at least {self.min_pos} here; got {n_pos}")


@dataclass
class _Part:
    """Prompts of one domain on their way: ids and the indices of those that are kept."""

    raw: RawPrompts
    ids: list[Any]
    kept: list[int]


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
    request = _Request(tokenizer, spec, seed, bos, n_pos, min_pos)
    request.check()
    domains = raw.domains or {"": raw}
    parts = [
        _prepare(part, request, index, f"{part.source} ({name})" if name else part.source)
        for index, (name, part) in enumerate(domains.items())
    ]
    left_out = sum(len(part.ids) - len(part.kept) for part in parts)
    if left_out and report:
        total = sum(len(part.ids) for part in parts)
        report(f"{left_out} of {total} prompts have fewer than {n_pos} tokens and are left out")
    return _pack(parts, raw, bos, left_out)


def _prepare(raw: RawPrompts, request: _Request, index: int, where: str) -> _Part:
    if raw.generated:
        ids = _draw(raw, request, index)
    elif raw.texts:
        ids = _encode(raw.texts, request, where)
    else:
        ids = list(raw.ids)
    ids = [_apply_bos(prompt, request, bool(raw.generated)) for prompt in ids]
    for prompt, tokens in enumerate(ids):
        _check_ids(tokens, request.spec, f"prompt {prompt} of {where}")
    kept = _choose(ids, request, where)
    return _Part(raw, [tokens[: request.n_pos] for tokens in ids], kept)


def _draw(raw: RawPrompts, request: _Request, index: int) -> list[Any]:
    """Draw ids uniformly over the vocabulary; ``repeat`` draws one id for each prompt."""
    import torch  # a cached run never gets here

    n_pos = request.n_pos or max(min(DRAWN_TOKENS, request.spec.n_ctx), request.min_pos)
    shape = (raw.limit or DRAWN_PROMPTS, 1 if raw.generated == "repeat" else n_pos)
    # The domain's index keeps two random domains from being the same prompts.
    generator = torch.Generator().manual_seed(request.seed + index)
    drawn = torch.randint(request.spec.d_vocab, shape, generator=generator)
    return list(drawn.expand(-1, n_pos).numpy().copy())


def _encode(texts: tuple[str, ...], request: _Request, where: str) -> list[Any]:
    import numpy as np

    if request.tokenizer is None:
        raise DataError(
            f"{request.spec.name} has no tokenizer, so its prompts must be token ids; {where} is "
            "text; use a .safetensors with tokens, random or repeat"
        )
    encoded = request.tokenizer(
        list(texts),
        add_special_tokens=request.bos != "never",
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it warns of long texts, which are refused below
    )["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def _apply_bos(ids: Any, request: _Request, drawn: bool) -> Any:
    import numpy as np

    if request.bos == "auto":
        return ids
    bos = getattr(request.tokenizer, "bos_token_id", None)
    begins = bos is not None and len(ids) > 0 and ids[0] == bos
    if request.bos == "never":
        # Drawn ids are uniform over the vocabulary; taking some off would change their law.
        return ids[1:] if begins and not drawn else ids
    if bos is None:
        raise DataError(
            f"bos=always needs a tokenizer with a BOS token; that of {request.spec.name} has "
            "none; use bos=auto"
        )
    if begins:
        return ids
    # Drawn prompts keep their length: the BOS takes the place of the first id.
    return np.concatenate([np.asarray([bos], dtype=np.int64), ids[1:] if drawn else ids])


def _check_ids(ids: Any, spec: Any, where: str) -> None:
    if not len(ids):
        raise DataError(f"a prompt must have at least one token; {where} has none")
    bad = ((ids < 0) | (ids >= spec.d_vocab)).nonzero()[0]
    if len(bad):
        raise DataError(
            f"token ids must lie in 0 to {spec.d_vocab - 1}, the vocabulary of {spec.name}; "
            f"{where} has {ids[bad[0]]} at position {bad[0]}; use this model's tokenizer"
        )


def _choose(ids: list[Any], request: _Request, where: str) -> list[int]:
    """Indices of the prompts to keep: all, or with ``n_pos`` those that are long enough."""
    lengths = [len(tokens) for tokens in ids]
    n_ctx, n_pos, shortest = request.spec.n_ctx, request.n_pos, min(lengths)
    if n_pos is not None:
        if max(lengths) < n_pos:
            raise DataError(
                f"with n_pos={n_pos} a prompt must have {n_pos} tokens; the longest of the "
                f"{len(ids)} of {where} has {max(lengths)}; choose a smaller n_pos or longer text"
            )
        return [index for index, length in enumerate(lengths) if length >= n_pos]
    if shortest < request.min_pos:
        raise DataError(
            f"a prompt must have at least {request.min_pos} tokens here; prompt "
            f"{lengths.index(shortest)} of {where} has {shortest}; leave it out or lengthen it"
        )
    for index, length in enumerate(lengths):
        if length > n_ctx:
            raise DataError(
                f"a prompt must fit into the {n_ctx} tokens that {request.spec.name} takes; "
                f"prompt {index} of {where} has {length}; shorten it, or cut all prompts with "
                f"--set n_pos={n_ctx}"
            )
    return list(range(len(ids)))


def _pack(parts: list[_Part], raw: RawPrompts, bos: str, left_out: int) -> Prompts:
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


def _gather(parts: list[_Part], name: str) -> tuple[Any, ...] | None:
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
    digest.update(np.ascontiguousarray(tokens * kept, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(kept, dtype="u1").tobytes())
    return digest.hexdigest()


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
