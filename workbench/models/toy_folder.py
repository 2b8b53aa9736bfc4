"""From the folder of a trained toy to a model of the ``toy`` backend."""

import importlib
import json
from pathlib import Path

import torch
from torch import nn

from workbench.errors import ModelError
from workbench.models.toy import ToyAdapter
from workbench.revisions import checkpoints, folder_revision

ARCHITECTURES = {"toy": "toy_tasks.model", "scan-snap": "toy_tasks.scan_snap_model"}
"""The module that makes a toy model from its config.json, by its ``model_type``; named here,
because the core imports no toy task."""

NO_MODEL = ("state-space",)
"""Toys whose folder is a record of several stacks without attention or unembedding."""


def is_toy_folder(name: str) -> bool:
    """Whether a name is the folder of a toy model."""
    try:
        described = json.loads((Path(name).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("model_type") in (
        *ARCHITECTURES,
        *NO_MODEL,
    )


def load_toy(
    folder: str, revision: str | None = None, *, dtype: str = "auto", device: str = "auto"
) -> ToyAdapter:
    """Load a trained toy model from its folder.

    Args:
        folder: Of the run.
        revision: The step of one of its checkpoints; None: the end of training.
        dtype: ``auto`` keeps the checkpoint's.
        device: ``auto`` takes CUDA where there is one.

    Raises:
        ModelError: It is unfinished or damaged, or has no checkpoint of that step.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    _refuse_records(path)
    weights = path / "model.safetensors" if revision is None else _checkpoint(path, revision)
    if not weights.is_file():
        raise ModelError(
            f"a toy model must have {weights.name}, which the end of its training writes; {path} has "
            "none; go on training it with the same command, or name one of its checkpoints as revision"
        )
    try:
        described = json.loads((path / "config.json").read_bytes())
        architecture = importlib.import_module(ARCHITECTURES[described["model_type"]])
        model: nn.Module = architecture.model_from(described)
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"config.json and {weights.name} of a toy must be whole and fit each other; in {path} "
            f"they do not ({reason}); train it again"
        ) from error
    bad = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if bad:
        raise ModelError(f"weights must be finite; {bad[0]} of {path} holds NaN or infinity")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, None if dtype == "auto" else getattr(torch, dtype))
    name = path.resolve().name
    if revision is None:
        return ToyAdapter(model, name=name, revision=folder_revision(path))
    # Another checkpoint of one run is another model, with the run's own settings.
    identity = folder_revision(path, checkpoint=weights)
    return ToyAdapter(model, name=f"{name}@{revision}", revision=identity)


def _refuse_records(path: Path) -> None:
    if not is_toy_folder(str(path)):
        return
    kind = json.loads((path / "config.json").read_bytes())["model_type"]
    if kind in NO_MODEL:
        raise ModelError(
            f"toy:DIR must be the folder of a model with tokens and logits; {path} is a run of "
            f"{kind}, which no probe reads; see its figures with workbench results show"
        )


def _checkpoint(folder: Path, revision: str) -> Path:
    """The file of one step of a run."""
    found = checkpoints(folder)
    if revision not in found:
        steps = ", ".join(found) or "none"
        raise ModelError(
            f"revision of a toy must be the step of a checkpoint in {folder / 'checkpoints'}; got "
            f"{revision!r}; there are: {steps}"
        )
    return found[revision]
