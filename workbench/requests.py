"""A run as it is asked for, and the short way to its answer.

What a result is kept under (``content_key``) is known only after a model's tokenizer has read the
prompts. What was *asked* is known at once, from files and texts alone. The store remembers which
key a request led to, so asking again finds the result without loading a model and without torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.discovery import probe_source
from workbench.errors import ConfigError, UnknownNameError
from workbench.models.names import looks_local, resolve_model
from workbench.provenance import environment, request_hash
from workbench.raw_prompts import RawPrompts, raw_hash
from workbench.revisions import checkpoints, folder_revision, resolve_hub_revision, tokenizer_hash

if TYPE_CHECKING:
    from workbench.result import Result
    from workbench.store.results import Store

CACHE_POLICIES = ("read", "refresh", "off")
MAX_SEED = 2**62
"""torch takes 64 bits; domains add their index."""


@dataclass(frozen=True)
class Options:
    """How a run is done, beside the probe's own settings."""

    seed: int = 0
    backend: str = "hf"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    """Prompts a forward pass; None: chosen from the sizes. Never changes the numbers."""
    limit: int | None = None
    """Only the first so many prompts."""
    bos: str = "auto"
    """``auto``: as the tokenizer does by itself; ``always``, ``never``."""
    n_pos: int | None = None
    """Cut prompts to so many tokens and leave shorter ones out; None: whole prompts."""
    cache: str = "read"
    """``read`` the store first; ``refresh``: compute and replace; ``off``: do not touch it."""

    def __post_init__(self) -> None:
        if self.cache not in CACHE_POLICIES:
            raise UnknownNameError("cache policy", self.cache, CACHE_POLICIES)
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be between 0 and {MAX_SEED}; got {self.seed}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {self.batch_size}")


@dataclass(frozen=True)
class ModelFiles:
    """Which model and which tokenizer exactly, as files tell."""

    name: str
    """As results have it: of a folder its own name."""
    revision: str | None
    """Hash of the weights or commit; None when it is not known without the network."""
    tokenizer: str | None
    """Of a folder, the hash of its tokenizer's files."""


def model_files(model: str, revision: str | None, hashes: Path | None = None) -> ModelFiles:
    """Look a model up on this machine.

    Args:
        model: A folder, a hub id, ``demo`` or ``toy:DIR``.
        revision: Of a hub id; of a toy's run, the step of one of its checkpoints.
        hashes: Where hashes of large weight files are remembered.

    Raises:
        ModelError: A folder that cannot be loaded.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir() and not looks_local(model):
        return ModelFiles(model, resolve_hub_revision(model, revision), None)
    checkpoint = checkpoints(folder).get(revision) if revision else None
    identity = folder_revision(folder, hashes, checkpoint=checkpoint)
    return ModelFiles(folder.resolve().name, identity, tokenizer_hash(folder))


def request_of(
    probe: str,
    model: str,
    raw: RawPrompts | None,
    options: Options,
    settings: Mapping[str, Any],
    hashes: Path | None = None,
) -> str | None:
    """The request's hash, from files and texts alone; None when they do not suffice.

    Args:
        probe: Its name.
        model: A folder, a hub id, ``demo`` or ``toy:DIR``.
        raw: The prompts as they were found; None for probes that need none.
        options: How the run is done.
        settings: The probe's settings as they were given.
        hashes: Where hashes of large weight files are remembered.

    Raises:
        ModelError: A folder that cannot be loaded.
    """
    files = model_files(model, options.revision, hashes)
    data = None if raw is None else raw_hash(raw)
    return request_from(probe, probe_hash(probe), files, data, options, settings)


def request_from(
    probe: str,
    sources: str | None,
    model: ModelFiles,
    data: str | None,
    options: Options,
    settings: Mapping[str, Any],
) -> str | None:
    """The request's hash, when its files have been read.

    Args:
        probe: Its name.
        sources: ``probe_hash`` of the probe.
        model: ``model_files`` of the model.
        data: ``raw_hash`` of the prompts; None for probes that need none.
        options: How the run is done.
        settings: The probe's settings as they were given.
    """
    if sources is None or model.revision is None:
        return None
    how = dict(vars(options))
    for name in ("batch_size", "cache", "device"):  # none of them changes the numbers
        del how[name]
    fields = {
        "probe": [probe, sources],
        "model": [model.name, model.revision],
        "tokenizer": model.tokenizer,
        "data": data,
        "options": how,
        "settings": {name: _setting_text(value) for name, value in settings.items()},
        "environment": environment(),
    }
    return request_hash(fields)


def edited_request(request: str | None, intervention: Mapping[str, Any] | None) -> str | None:
    """The request on a model that is edited; the same one without an intervention.

    Files that the intervention names count by their content. None where it holds more than plain data.
    """
    if request is None or intervention is None:
        return request
    files = {
        name: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for name, value in intervention.items()
        if isinstance(value, str) and _is_file(value)
    }
    try:
        return request_hash({"request": request, "intervention": intervention, "files": files})
    except TypeError:  # a tensor, say
        return None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def probe_hash(probe: str) -> str | None:
    """Hash of the files that define a probe; None when there are none of its name."""
    source = probe_source(probe)
    return None if source is None else _sources_hash(source)


def _sources_hash(source: Path) -> str:
    """Hash of a probe's module and of its parts, which bear its name and more."""
    parts = [source, *sorted(source.parent.glob(f"{source.stem}_*.py"))]
    return hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()


def _setting_text(value: Any) -> str:
    """A setting as text; one that names a folder with the hash of the files in it."""
    text = str(value)
    folder = Path(text).expanduser()
    if not text or not folder.is_dir():
        return text
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return f"{text}@{digest.hexdigest()}"


def answer(store: "Store", request: str | None) -> "Result | None":
    """The kept result of an earlier, equal request, or None."""
    key = store.find_request(request) if request else None
    return store.find(key) if key else None
