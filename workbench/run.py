"""``wb.run``: the only place where probe, model, prompts, config and store meet.

The key is looked up first, and a hit never loads the model.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.discovery import find_probe
from workbench.errors import ConfigError, DataError, EngineError, StoreError
from workbench.identity import identity_of
from workbench.interventions.document import read_document
from workbench.memory import backing_off
from workbench.provenance import content_key, environment
from workbench.raw_prompts import RawPrompts
from workbench.registry import Probe
from workbench.requests import Options, answer, edited_request, request_of
from workbench.settings import make_config
from workbench.sources import read_source

if TYPE_CHECKING:
    from workbench.prompts import Prompts
    from workbench.result import Result
    from workbench.store.pieces import Pieces
    from workbench.store.results import Store


def _silent(*_: Any) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Reporter:
    """Where a run tells what it does; nothing by default."""

    progress: Callable[[int, int], None] = _silent
    """(done, total)."""
    message: Callable[[str], None] = _silent
    """One line for people."""
    status: Callable[[str], None] = _silent
    """Where a long search stands, in one line that replaces the last."""


def run(
    probe: str,
    model: Any,
    data: Any = None,
    seed: int = 0,
    store: Any = None,
    *,
    reporter: Reporter | None = None,
    intervention: Any = None,
    **settings: Any,
) -> "Result":
    """Run a probe on a model and prompts.

    Args:
        probe: Its name, e.g. ``"attention-sinks"``.
        model: A model from ``wb.load`` or ``wb.wrap``, or its name.
        data: Texts, tokens ``[batch pos]``, or what ``--data`` takes; see ``workbench.sources``.
        seed: Of everything random.
        store: A ``wb.Store`` or its folder, to keep and reuse the result; None: do neither.
        reporter: Told about progress.
        intervention: An edit of the model while it is measured, besides those that are active on
            it: an object, the content of an intervention file, or its path.
        settings: The probe's settings, and the fields of ``workbench.requests.Options``
            (``backend``, ``dtype``, ``limit``, ``n_pos``, ``batch_size``, ``cache``, ...).

    Raises:
        WorkbenchError: One of its children; see ``workbench.errors``.
    """
    reporter = reporter or Reporter()
    names = {field.name for field in dataclasses.fields(Options)}
    options = Options(seed=seed, **{key: settings.pop(key) for key in names & set(settings)})
    place = _open_store(store, options)
    raw = None if data is None else read_source(data, options.limit)
    edit = read_document(intervention) if isinstance(intervention, str | Path) else intervention
    request = None
    # What an object holds is not known without importing its class, and torch with it.
    if place is not None and isinstance(model, str) and isinstance(edit, Mapping | None):
        base = request_of(probe, model, raw, options, settings, place.path / "hashes")
        request = edited_request(base, edit)
        found = answer(place, request) if options.cache == "read" else None
        if found is not None:
            return found
    asked = find_probe(probe)
    config = _check(asked, raw, settings, edit)
    loaded = _open_model(asked, model, options, reporter)
    with nullcontext() if edit is None else loaded.edit(edit):
        return _prepare(asked, loaded, raw, config, options, reporter).result(place, request)


def _open_store(store: Any, options: Options) -> "Store | None":
    from workbench.store.results import Store

    if store is None or options.cache == "off":
        return None
    return Store(store) if isinstance(store, str | Path) else store


@dataclass(frozen=True)
class _Job:
    """Everything a measurement needs, checked; nothing has run yet."""

    probe: Probe
    model: Any
    config: Any
    prompts: "Prompts | None"
    options: Options
    reporter: Reporter
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        return content_key(self.identity)

    def result(self, store: "Store | None", request: str | None) -> "Result":
        """Find or compute the result, and keep it where a store is given."""
        if store is None:
            return self.compute()
        found = self._find(store)
        if found is None:
            found = self._compute_once(store)
        if request is not None:
            # A shortcut for next time: that it cannot be kept must not cost the result.
            try:
                store.remember_request(request, found.key)
            except StoreError as error:
                self.reporter.message(str(error))
        return found

    def _find(self, store: "Store") -> "Result | None":
        return store.find(self.key) if self.options.cache == "read" else None

    def _compute_once(self, store: "Store") -> "Result":
        with store.lease(self.key):
            # Somebody else may have finished it while we waited.
            found = self._find(store)
            if found is not None:
                return found
            from workbench.store.pieces import Pieces

            refresh = self.options.cache == "refresh"
            # Parts of another batch size are another layout: they never mix.
            pieces_of = lambda size: Pieces(store.path, self.key, f"batch_size={size}")  # noqa: E731
            if refresh:
                pieces_of(None).discard()
            result = store.publish(self.compute(pieces_of), replace=refresh)
            pieces_of(None).discard()
            return result

    def compute(self, pieces_of: "Callable[[int | None], Pieces] | None" = None) -> "Result":
        """Measure now; finished parts are kept in what ``pieces_of`` gives for a batch size."""
        from workbench.models.inputs import device_of
        from workbench.result import Result

        def attempt(size: int | None) -> Any:
            if pieces_of is None:
                return self._measure(size, {})
            pieces = pieces_of(size)
            return self._measure(size, {"keep": pieces.get_or_compute, "drafts": pieces})

        start = time.perf_counter()
        size = self._batch_size()
        if size is None or self.options.batch_size is not None:
            measured = attempt(size)
        else:
            n_prompts = len(self.prompts.tokens) if self.prompts is not None else size
            measured = backing_off(size, attempt, n_prompts, self.reporter.message)
        provenance = {
            **self.identity,
            "prompts": self._describe_prompts(),
            "environment": environment(),
            "device": str(device_of(self.model)),
            "seconds": round(time.perf_counter() - start, 3),
        }
        result = Result.from_measurement(self.probe, measured, key=self.key, provenance=provenance)
        _refuse_nan(result)
        return result

    def _measure(self, batch_size: int | None, keep: dict[str, Any]) -> Any:
        import torch

        from workbench.context import Context

        prompts = self.prompts
        context = Context(
            None if prompts is None else prompts.attention_mask,
            self.options.seed,
            batch_size,
            self.reporter.progress,
            {} if prompts is None else prompts.labels,
            () if prompts is None else prompts.rows or (),
            status=self.reporter.status,
            **keep,
        )
        tokens = torch.zeros(0, 0, dtype=torch.long) if prompts is None else prompts.tokens
        return self.probe.measure(self.model, tokens, self.config, context)

    def _batch_size(self) -> int | None:
        if self.options.batch_size is not None or self.prompts is None:
            return self.options.batch_size
        from workbench.models.memory import fitting_batch_size

        return fitting_batch_size(self.model, self.prompts.tokens.shape[1])

    def _describe_prompts(self) -> dict[str, Any] | None:
        from workbench.prompts import describe

        return None if self.prompts is None else describe(self.prompts)


def _check(probe: Probe, raw: RawPrompts | None, settings: Mapping[str, Any], edit: Any) -> Any:
    """The probe's config; refuses what can be refused before a model is loaded."""
    if probe.is_toy:
        raise ConfigError(
            f"run takes a probe; {probe.name} is a toy task; use: workbench train {probe.name}"
        )
    config = make_config(probe.config, settings, probe.name)
    if raw is None and probe.needs_data:
        raise DataError(
            f"{probe.name} needs prompts; none were given; try --data builtin:natural, or give texts "
            "or tokens as data"
        )
    if isinstance(edit, Mapping):
        from workbench.interventions.files import from_content

        from_content(edit)
    return config


def _open_model(probe: Probe, model: Any, options: Options, reporter: Reporter) -> Any:
    """The model, loaded where it was named, with everything that the probe needs."""
    from workbench.models.base import require
    from workbench.models.load import load, wrap

    if isinstance(model, str):
        reporter.message(f"loading {model}")
        model = load(model, options.backend, options.revision, options.dtype, options.device)
    model = wrap(model)
    require(model, probe.needs, f"probe {probe.name}")
    return model


def _prepare(
    probe: Probe,
    model: Any,
    raw: RawPrompts | None,
    config: Any,
    options: Options,
    reporter: Reporter,
) -> _Job:
    """Read the prompts and find the key; the model's edits are active and part of it."""
    prompts = None
    if raw is not None and probe.takes_data:
        prompts = _tokenise(raw, model, options, reporter)
    identity = identity_of(probe, model, config, prompts, options)
    return _Job(probe, model, config, prompts, options, reporter, identity)


def _tokenise(raw: RawPrompts, model: Any, options: Options, reporter: Reporter) -> "Prompts":
    from workbench.prompts import tokenise

    return tokenise(
        raw,
        model.tokenizer,
        model.spec,
        seed=options.seed,
        bos=options.bos,
        n_pos=options.n_pos,
        report=reporter.message,
    )


def _refuse_nan(result: "Result") -> None:
    """A model that overflowed yields NaN: an error, never a result."""
    bad = sorted(name for name, value in result.metrics().items() if math.isnan(value))
    if bad:
        raise EngineError(
            f"measurements must be numbers; {bad[0]} of {result.probe} is NaN; the model may have "
            "overflowed in half precision; try --dtype float32"
        )
