"""From prompts as found to token ids: tokenizer, BOS, vocabulary and length, one domain at a time.

Importing this module does not import torch.
"""

from dataclasses import dataclass
from typing import Any

from workbench.errors import ConfigError, DataError
from workbench.raw_prompts import RawPrompts

BOS_POLICIES = ("auto", "always", "never")
DRAWN_PROMPTS = 100
DRAWN_TOKENS = 64


@dataclass(frozen=True)
class Request:
    """What ``tokenise`` was asked for."""

    tokenizer: Any
    spec: Any
    seed: int
    bos: str
    n_pos: int | None
    min_pos: int

    def check(self) -> None:
        """Refuse an impossible ``bos`` or ``n_pos``."""
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
class Part:
    """Prompts of one domain on their way: ids and the indices of those that are kept."""

    raw: RawPrompts
    ids: list[Any]
    kept: list[int]


def encode(raw: RawPrompts, request: Request, index: int, where: str) -> Part:
    """Turn prompts into ids that the model takes, and choose those that are long enough.

    Args:
        raw: The prompts of one domain.
        request: What was asked for.
        index: Which domain it is; keeps two drawn domains from being the same prompts.
        where: What to call it in messages.

    Raises:
        DataError: See ``workbench.prompts.tokenise``.
    """
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
    return Part(raw, [tokens[: request.n_pos] for tokens in ids], kept)


def _draw(raw: RawPrompts, request: Request, index: int) -> list[Any]:
    """Draw ids uniformly over the vocabulary; ``repeat`` draws one id for each prompt."""
    import torch  # a cached run never gets here

    n_pos = request.n_pos or max(min(DRAWN_TOKENS, request.spec.n_ctx), request.min_pos)
    shape = (raw.limit or DRAWN_PROMPTS, 1 if raw.generated == "repeat" else n_pos)
    generator = torch.Generator().manual_seed(request.seed + index)
    drawn = torch.randint(request.spec.d_vocab, shape, generator=generator)
    return list(drawn.expand(-1, n_pos).numpy().copy())


def _encode(texts: tuple[str, ...], request: Request, where: str) -> list[Any]:
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


def _apply_bos(ids: Any, request: Request, drawn: bool) -> Any:
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


def _choose(ids: list[Any], request: Request, where: str) -> list[int]:
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


MOST_TEXTS = 8192
"""Tokens of a result that are kept as text: enough to name them on hover, little on disk."""


def token_texts(tokenizer: Any, tokens: Any) -> tuple[str, ...]:
    """Every token as text, row by row, "" where it is -1; its number where there is no tokenizer."""
    ids = tokens.flatten().tolist()
    if tokenizer is None:
        return tuple("" if i < 0 else str(i) for i in ids)
    return tuple("" if i < 0 else str(tokenizer.decode([i])) for i in ids)


def token_labels(tokenizer: Any, tokens: Any) -> dict[str, tuple[str, ...]]:
    """Labels that name the tokens of all prompts, row by row; none where there are very many."""
    return {"token": token_texts(tokenizer, tokens)} if tokens.numel() <= MOST_TEXTS else {}
