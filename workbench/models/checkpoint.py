"""Reads a checkpoint with transformers: a folder or a hub id, safetensors only."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.errors import ConfigError, ModelError
from workbench.models.weights import check_finite


@dataclass(frozen=True)
class Source:
    """What to load and how; see ``workbench.models.load.load``."""

    path: str
    """A folder or a hub id."""
    shown: str
    """What the user called it."""
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: Any = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.path)
        looks_local = path.is_absolute() or self.path.startswith(".") or path.exists()
        return path if looks_local else None


@dataclass(frozen=True)
class Identity:
    """What a loaded model is called in results."""

    name: str
    revision: str


def load_transformers(source: Source) -> tuple[Any, Any, Identity]:
    """Load a causal language model and its tokenizer (None if it has none).

    Raises:
        ModelError: See ``workbench.models.load.load``.
    """
    identity = identify(source)
    config = read_config(source)
    model = _load_weights(source, config)
    bad = check_finite(model)
    if bad is not None:
        raise ModelError(
            f"weights must be finite; {bad} of {source.shown} holds NaN or infinity; get an undamaged checkpoint"
        )
    if source.device_map is None:
        model.to(pick_device(source.device))
    if not identity.revision:
        identity = Identity(identity.name, getattr(model.config, "_commit_hash", None) or "unknown")
    return model, load_tokenizer(source), identity


def identify(source: Source) -> Identity:
    """Name and revision, as far as they are known before loading."""
    from workbench.revisions import folder_revision

    if source.folder is None:
        return Identity(source.path, "")
    # Only the folder's own name: results must not tell where it lies on somebody's disk.
    shown = source.shown if source.shown == "demo" else source.folder.resolve().name
    if source.trust_remote_code and source.folder.is_dir():
        return Identity(shown, folder_revision(source.folder, allow_remote_code=True))
    return Identity(shown, folder_revision(source.folder))


def read_config(source: Source) -> Any:
    """The checkpoint's transformers config."""
    from transformers import AutoConfig

    return _from_hub(
        source,
        lambda: AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        ),
    )


def _load_weights(source: Source, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from workbench.models.encoders import encoder_class

    encoder = encoder_class(config.model_type)
    kind = AutoModelForCausalLM if encoder is None else encoder
    if encoder is not None:
        config = config.get_text_config()
    options: dict[str, Any] = {
        "config": config,
        "revision": source.revision,
        "dtype": "auto" if source.dtype == "auto" else getattr(torch, source.dtype),
        "use_safetensors": True,
        "trust_remote_code": source.trust_remote_code,
        "output_loading_info": True,
    }
    if source.device_map is not None:
        options["device_map"] = source.device_map
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    model, info = _from_hub(source, lambda: kind.from_pretrained(source.path, **options))
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"the checkpoint must hold every weight of its architecture; {source.shown} lacks "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; get a complete checkpoint"
        )
    return model


def load_tokenizer(source: Source) -> Any:
    """The checkpoint's tokenizer, or None if a folder brings none."""
    from transformers import AutoTokenizer

    folder = source.folder
    if folder is not None and not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    return _from_hub(
        source,
        lambda: AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        ),
    )


def pick_device(device: str) -> str:
    """``auto`` -> CUDA where there is one.

    Raises:
        ConfigError: A device that this machine lacks.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device must exist; {device} was asked and torch finds no CUDA here; use --device cpu"
        )
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu or cuda[:N]; got {device}") from error
    return device


def _from_hub(source: Source, call: Any) -> Any:
    """Run a from_pretrained call; its many exceptions become one line."""
    from safetensors import SafetensorError

    try:
        with quiet():
            return call()
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {source.shown} must be whole safetensors files; {_line(error)}; fetch them again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source.shown} brings its own code, which is never run unasked; if you trust it, say "
                "trust_remote_code=True in wb.load"
            ) from error
        where = (
            "it must be a folder with config.json and safetensors"
            if source.folder
            else (
                "it must be a local folder or an id that the Hugging Face hub (or its cache) has; is there a network?"
            )
        )
        raise ModelError(f"cannot load {source.shown}: {where} ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, load reports and the hub's retries off the screen meanwhile."""
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    library.set_verbosity_error()
    library.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        hub.setLevel(level)
        if bars:
            library.enable_progress_bar()
