"""Which model and which tokenizer exactly: hashes of local folders, commits of hub ids.

Without torch or transformers, so that a cached run can tell that its model is unchanged.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench.errors import ModelError
from workbench.provenance import canonical_json

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_CLOCK_TICK_NS = 1_000_000_000

_hashes: dict[tuple[str, int, int, int], str] = {}

# Files


def file_hash(path: Path, cache: Path | None = None) -> str:
    """SHA-256 of a file, read once for each (path, size, modification time, inode).

    Args:
        path: The file.
        cache: A folder to remember the hash in; damage to it costs a second reading only.
    """
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key in _hashes:
        return _hashes[key]
    # The name hides the path: the cache may lie in a store that is given away.
    note = cache / hashlib.sha256(repr(key).encode()).hexdigest() if cache else None
    digest = _recall(note) if note else None
    if digest is None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file written within the last clock tick can change again without its time changing.
        if time.time_ns() - stat.st_mtime_ns < _CLOCK_TICK_NS:
            return digest
        if note:
            _remember(note, digest)
    _hashes[key] = digest
    return digest


def _seal(note: Path, digest: str) -> str:
    return hashlib.sha256(f"{note.name} {digest}".encode()).hexdigest()


def _recall(note: Path) -> str | None:
    try:
        digest, seal = note.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return digest if seal == _seal(note, digest) else None


def _remember(note: Path, digest: str) -> None:
    """Keep a hash on disk in one step; where that cannot be, the file is read again next time."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(f"{digest} {_seal(note, digest)}\n")
        Path(name).replace(note)
    except OSError:
        return


# Models


def checkpoints(folder: Path) -> dict[str, Path]:
    """The weights of a toy's run at its steps, by step in rising order, as ``toy_tasks.training`` names them."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step_*.safetensors")):
        step = path.stem.removeprefix("step_")
        if step.isdecimal():
            found[str(int(step))] = path
    return found


def folder_revision(
    folder: Path,
    cache: Path | None = None,
    *,
    checkpoint: Path | None = None,
    allow_remote_code: bool = False,
) -> str:
    """Hash of a local model folder: its configuration and all its weights.

    Args:
        folder: In the format of transformers, with safetensors weights.
        cache: Where to remember hashes of large files.
        checkpoint: Of a toy's run, whose weights count instead: the same before and after its end.
        allow_remote_code: The user has said that code of the model's own may run.

    Raises:
        ModelError: No folder, no ``config.json``, no weights, only pickled weights, or code of
            the model's own that would have to be run.
    """
    config = _read_config(folder)
    if not allow_remote_code:
        _refuse_remote_code(config, folder)
    weights = weight_files(folder) if checkpoint is None else [checkpoint]
    beside = [folder / name for name in ("config.json", "generation_config.json")]
    kept = [path for path in beside if path.is_file()]
    try:
        files = [[path.name, file_hash(path, cache)] for path in [*kept, *weights]]
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"model files must be readable; {folder}: {reason}") from error
    return hashlib.sha256(canonical_json(files)).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"a local model must be a folder; there is no folder {folder}")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"a model folder must have config.json; {folder} has none; give the folder that "
            "save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json of {folder} must be readable JSON; {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {folder} must be a JSON object; it is none")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the shards of its index, in the index's order.

    Raises:
        ModelError: There are none, only pickled ones, or a shard is missing.
    """
    if (folder / _INDEX).is_file():
        return _shards(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"weights must be safetensors; {folder} has only pickled ones ({pickled[0]}), which "
            "can run code when read; convert them where you trust them, with transformers' "
            "save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"a model folder must have weights (*.safetensors); {folder} has none")


def _shards(folder: Path) -> list[Path]:
    try:
        names = list(
            dict.fromkeys(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        )
        paths = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{_INDEX} of {folder} must have a weight_map; it is damaged") from error
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ModelError(
                f"every shard of {_INDEX} must be in the folder; {path.name} is missing from "
                f"{folder}; fetch it again"
            )
    if not paths:
        raise ModelError(f"{_INDEX} of {folder} must name at least one shard; it names none")
    return paths


def _refuse_remote_code(config: dict[str, Any], folder: Path) -> None:
    """Refuse a model whose classes are not transformers' own.

    Some folders (Phi-3, Falcon) carry old copies of classes that transformers has by now under
    the same name; those load with the native class and run nothing from the folder.
    """
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return
    native = _native_classes(str(config.get("model_type", "")))
    wanted = {str(target).rsplit(".", 1)[-1] for target in auto_map.values()}
    if wanted - native:
        raise ModelError(
            f"a model must be of a type that transformers has; {folder} brings its own code "
            f"({sorted(wanted - native)[0]} in auto_map), which the workbench never runs; use a "
            "version of the model without auto_map, or load it yourself and use wb.wrap"
        )


def _native_classes(model_type: str) -> set[str]:
    """Names of the classes that transformers defines for a model type, read as text."""
    package = find_spec("transformers")
    name = model_type.replace("-", "_")
    if package is None or not package.origin or not re.fullmatch(r"\w+", name):
        return set()
    home = Path(package.origin).parent / "models" / name
    sources = (path.read_text(encoding="utf-8") for path in home.glob("*.py"))
    return {found for text in sources for found in re.findall(r"^class (\w+)", text, re.MULTILINE)}


# Tokenizers


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Hash of a tokenizer: of a folder's files (a path) or of a loaded tokenizer's behaviour.

    The two kinds of hash differ for the same tokenizer. None: a folder without a tokenizer.
    """
    if isinstance(tokenizer, str | Path):
        folder = Path(tokenizer)
        found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
        if not found:
            return None
        return hashlib.sha256(canonical_json([[p.name, file_hash(p)] for p in found])).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are set by each call and would change the hash between calls.
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": dict(tokenizer.get_vocab())}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    flags = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return hashlib.sha256(canonical_json([rules, special, flags])).hexdigest()


# Hub


def resolve_hub_revision(
    name: str, revision: str | None = None, *, cache: Path | None = None
) -> str | None:
    """Find the commit of a hub model in the local Hugging Face cache; never asks the network.

    Args:
        name: ``gpt2`` or ``EleutherAI/pythia-70m``.
        revision: Branch, tag or commit; ``main`` when None.
        cache: The hub cache, if not the usual one.

    Returns:
        The 40 hex digits, or None when the cache does not know.
    """
    revision = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in f"{name}/{revision}":
        return None
    reference = _hub_home(name, cache) / "refs" / revision
    try:
        commit = reference.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def hub_folder(name: str, revision: str | None = None, *, cache: Path | None = None) -> Path | None:
    """The folder of a hub model in the local Hugging Face cache, if it is there."""
    commit = resolve_hub_revision(name, revision, cache=cache)
    if commit is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    folder = _hub_home(name, cache) / "snapshots" / commit
    return folder if folder.is_dir() else None


def _hub_home(name: str, cache: Path | None) -> Path:
    if cache is None:
        from huggingface_hub.constants import HF_HUB_CACHE  # reads the environment

        cache = Path(HF_HUB_CACHE)
    return cache / f"models--{name.replace('/', '--')}"
