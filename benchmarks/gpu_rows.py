"""Rows of ``gpu.py``: ratios to the plain way, the aims that are missed, and what physics allows."""

from collections.abc import Mapping
from typing import Any

from gpu_methods import DECODING, KERNEL, PLAIN, SHAPES, STOCK, Subject
from peaks import Decoder, limits
from record import OURS, Row, ratios, spread, versions_of

PACKAGES = ("torch", "transformers")
TIME_AIM, MEMORY_AIM, SPEED_AIM = 1.3, 1.1, 0.95
WHY_READING = (
    "the pattern goes through tiles in float32 beside the flash kernel that makes the output, and each tile is "
    "several kernels"
)
WHY_KERNEL = (
    "queries and keys are multiplied once more, beside the flash kernel that makes the output"
)
WHY_DECODING = (
    "what an edit adds to a layer's attention is small kernels, and Python starts each of them"
)
"""Why ours may be behind."""

Found = dict[str, Any]
"""Of one way: ``seconds`` of every round and ``extra_mb``, or the ``error`` for which there are none."""


def reading_rows(
    subject: Subject, n_pos: int, found: Mapping[str, Found], peak: tuple[float, float]
) -> list[Row]:
    """Ways of reading a prompt, and what bounds the plain forward.

    Args:
        subject: The model.
        n_pos: Length of the prompt.
        found: By way.
        peak: Operations and bytes a second of the device.
    """
    base = _base(PLAIN, found)
    rows = []
    decoder, word = Decoder.llama(SHAPES[subject.shape]), subject.dtype.itemsize
    work = decoder.flops(n_pos, unembed=False), decoder.n_bytes(unembed=False, word=word)
    least = limits(*work, peak)
    for peer, each in found.items():
        row = _row(subject, peer, each, base, least, "s") | {"name": f"read, T = {n_pos:,}"}
        if "error" not in each:
            row["note"] = _reading_note(peer, each, base, row["ratio"])
        rows.append(Row(**row))
    return rows + _least_rows(rows[0], least)


def decoding_rows(
    subject: Subject,
    edits: Mapping[str, str],
    batch: int,
    found: Mapping[str, Found],
    peak: tuple[float, float],
) -> list[Row]:
    """Ways of generating at one batch size, by the seconds of a decoded step, and what bounds one.

    Args:
        subject: The model.
        edits: What each way changes; those of one edit are compared with each other.
        batch: Prompts.
        found: By way.
        peak: Operations and bytes a second of the device.
    """
    base, (n_pos, n_new) = _base(STOCK, found), DECODING[subject.shape]
    rows = []
    decoder = Decoder.llama(SHAPES[subject.shape])
    half_way = {"unembed": True, "cached": n_pos + n_new // 2, "batch": batch}
    n_bytes = decoder.n_bytes(**half_way, word=subject.dtype.itemsize)
    least = limits(decoder.flops(1, **half_way), n_bytes, peak)
    for peer, each in found.items():
        name = f"decode, {edits[peer]}; T = {n_pos:,}, batch {batch}"
        row = _row(subject, peer, each, base, least, "s a step") | {"name": name}
        if "error" not in each:
            row["note"] = _decoding_note(peer, batch / row["median"], 1.0 / row["ratio"])
        rows.append(Row(**row))
    return rows + _least_rows(rows[0], least)


def _base(reference: str, found: Mapping[str, Found]) -> Found:
    """What the others are compared with.

    Raises:
        SystemExit: It does not run here.
    """
    base = found[reference]
    if "error" in base:
        raise SystemExit(
            f"the {reference} must run, to be compared with; it does not here: {base['error']}; "
            "take another --dtype or --shape"
        )
    return base


def _row(
    subject: Subject,
    peer: str,
    each: Found,
    base: Found,
    least: Mapping[str, tuple[float, str]],
    unit: str,
) -> dict[str, Any]:
    """Entries of one way's row; name and note are its caller's."""
    version = None if peer.startswith(OURS) else versions_of("transformers")["transformers"]
    why = {"s": WHY_READING, "s a step": WHY_DECODING}[unit] if peer.startswith(OURS) else ""
    why = WHY_KERNEL if peer == KERNEL else why
    about = {"peer": peer, "version": version, "shape": about_shape(subject), "unit": unit}
    if "error" in each:
        return about | {"note": f"not measured: {each['error']}"}
    measured, limit = spread(each["seconds"]), max(seconds for seconds, _ in least.values())
    return {
        **about,
        **measured,
        **ratios(each["seconds"], base["seconds"]),
        "peak_memory": each["extra_mb"],
        "limit": limit,
        "distance": measured["median"] / limit,
        "why": why,
    }


def _least_rows(plain: Row, least: Mapping[str, tuple[float, str]]) -> list[Row]:
    """What the plain way takes at least, by arithmetic and by bandwidth."""
    assert plain.median is not None  # it was measured, or nothing is reported
    return [
        Row(
            name=plain.name,
            peer=f"least by {kind}",
            shape=plain.shape,
            median=seconds,
            unit=plain.unit,
            note=f"{how}; the {plain.peer} takes {plain.median / seconds:.3g} times it",
        )
        for kind, (seconds, how) in least.items()
    ]


def _reading_note(peer: str, each: Found, base: Found, ratio: float) -> str:
    """Memory beside the plain forward's, and which aims are missed."""
    memory = each["extra_mb"] / base["extra_mb"] if base["extra_mb"] else None
    said = [] if memory is None or peer == PLAIN else [f"{memory:.3g} times the plain memory"]
    if peer.startswith(OURS):
        if memory is not None and memory > MEMORY_AIM:
            said.append(f"misses the aim of {MEMORY_AIM} for memory")
        if ratio > TIME_AIM:
            said.append(f"misses the aim of {TIME_AIM} for time")
    return "; ".join(said)


def _decoding_note(peer: str, speed: float, share: float) -> str:
    """Tokens a second, also as a share of stock's, and whether the aim is missed."""
    said = f"{speed:,.3g} tokens/s"
    if peer != STOCK:
        said += f", {share:.3g} of stock's"
    if peer.startswith(OURS) and share < SPEED_AIM:
        said += f"; misses the aim of {SPEED_AIM}"
    return said


def about_shape(subject: Subject) -> str:
    """Sizes and precision of the model."""
    spec, dtype = subject.wrapped.spec, str(subject.dtype).removeprefix("torch.")
    return (
        f"{subject.shape} shape, {spec.n_layers} layers, {spec.n_heads} heads, d_model {spec.d_model}, "
        f"{spec.d_vocab:,} words, {dtype}"
    )
