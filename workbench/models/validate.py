"""``workbench validate``: proves on a model that hooks read and edit the real thing.

Nothing is printed here. A check that the model's backend cannot take part in is reported as
skipped, with the reason; a check that raises one of our own errors has failed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from workbench.errors import CapabilityError, WorkbenchError
from workbench.models.base import ModelAdapter
from workbench.models.validation import (
    backend_agrees,
    batch_equals_alone,
    cached_equals_uncached,
    edit_acts_where_it_says,
    edit_changes_logits,
    heads_are_zeroed,
    hooked_equals_unhooked,
    no_op_is_bitwise,
    padding_changes_nothing,
    pattern_edit_is_exact,
    residual_adds_up,
    rows_sum_to_one,
    stock_logits,
    streaming_equals_whole,
)
from workbench.models.validation_subject import Measured, Subject

N_PROMPTS = 2
N_POS = 16


@dataclass(frozen=True)
class Check:
    """One proof and its outcome."""

    name: str
    passed: bool | None
    """None: skipped, for the reason in ``detail``."""
    value: float | None
    """The largest difference found."""
    bound: float | None
    """What it must not exceed (where ``detail`` says so: what it must exceed)."""
    detail: str


@dataclass(frozen=True)
class Unavailable:
    """A backend that could not take the model, and why."""

    backend: str
    reason: str


_PROOFS: tuple[tuple[str, frozenset[str], Callable[[Subject], Measured]], ...] = (
    ("stock-logits", frozenset(), stock_logits),
    ("hooked-equals-unhooked", frozenset({"capture"}), hooked_equals_unhooked),
    ("rows-sum-to-one", frozenset({"patterns"}), rows_sum_to_one),
    ("streaming-equals-whole", frozenset({"patterns", "streaming"}), streaming_equals_whole),
    ("residual-adds-up", frozenset({"capture"}), residual_adds_up),
    ("no-op-is-bitwise", frozenset({"edits"}), no_op_is_bitwise),
    ("edit-changes-logits", frozenset({"edits"}), edit_changes_logits),
    ("edit-acts-where-it-says", frozenset({"capture", "edits"}), edit_acts_where_it_says),
    ("heads-are-zeroed", frozenset({"capture", "edits"}), heads_are_zeroed),
    ("pattern-edit-is-exact", frozenset({"patterns", "edits"}), pattern_edit_is_exact),
    ("padded-right", frozenset({"capture"}), padding_changes_nothing("right")),
    ("padded-left", frozenset({"capture"}), padding_changes_nothing("left")),
    ("batch-equals-alone", frozenset(), batch_equals_alone),
    ("cached-equals-uncached", frozenset({"generate", "edits"}), cached_equals_uncached),
)


def validate_model(
    model: ModelAdapter, *, other_backends: Sequence[ModelAdapter | Unavailable] = ()
) -> list[Check]:
    """Run every proof on a model.

    Args:
        model: The model to be proven.
        other_backends: The same weights through other backends; see ``companions``.
    """
    n_pos = min(N_POS, model.spec.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.spec.d_vocab, (N_PROMPTS, n_pos), generator=generator)
    subject = Subject(model, tokens)
    checks = [_run(name, needs, proof, subject) for name, needs, proof in _PROOFS]
    if not other_backends:
        reason = "no other backend was given"
        checks.append(Check("backends-agree", None, None, None, reason))
    for other in other_backends:
        name = f"agrees-with-{other.backend}"
        if isinstance(other, Unavailable):
            checks.append(Check(name, None, None, None, other.reason))
        else:
            checks.append(_run(name, frozenset(), backend_agrees(other), subject))
    return checks


def to_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as JSON-able rows."""
    return [asdict(check) for check in checks]


def _run(
    name: str, needs: frozenset[str], proof: Callable[[Subject], Measured], subject: Subject
) -> Check:
    model = subject.model
    missing = sorted(needs - model.capabilities)
    if missing:
        reason = f"the {model.backend} backend lacks {', '.join(missing)} for {model.spec.family}"
        return Check(name, None, None, None, reason)
    try:
        found = proof(subject)
    except CapabilityError as error:
        return Check(name, None, None, None, str(error))
    except WorkbenchError as error:
        return Check(name, False, None, None, str(error))
    return Check(name, found.passed, found.value, found.bound, found.detail)


def companions(model: ModelAdapter) -> list[ModelAdapter | Unavailable]:
    """The same weights through the other backends, without loading them again."""
    inner: Any = getattr(model, "model", None)
    if model.backend != "hf" or not isinstance(inner, torch.nn.Module):
        reason = f"start from --backend hf to compare; this model came through {model.backend}"
        return [Unavailable(other, reason) for other in ("transformer-lens", "nnsight")]
    return [
        _companion("transformer-lens", _through_bridge, inner),
        _companion("nnsight", _through_nnsight, inner),
    ]


def _companion(
    backend: str, build: Callable[[Any], ModelAdapter], inner: Any
) -> ModelAdapter | Unavailable:
    try:
        return build(inner)
    except ModuleNotFoundError as error:
        return Unavailable(backend, f"{error.name} is not installed")
    except CapabilityError as error:
        return Unavailable(backend, str(error))


def _through_bridge(inner: Any) -> ModelAdapter:
    from workbench.models.bridge_building import bridge_of
    from workbench.models.transformer_lens import TransformerLensModel

    return TransformerLensModel(bridge_of(inner))


def _through_nnsight(inner: Any) -> ModelAdapter:
    from workbench.models.nnsight_building import wrap_module

    twin = copy.deepcopy(inner, {id(parameter): parameter for parameter in inner.parameters()})
    twin.set_attn_implementation("eager")
    return wrap_module(twin)
