"""Files of a run: weights, the state to resume from, and figures, each whole or not there."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toy_tasks.training_config import TrainingConfig, TrainingError, lr_at

Figures = dict[str, float | int]
"""Named numbers of one step: a line of metrics.jsonl."""

# Weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name; a tied weight once."""
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights of a checkpoint."""
    tensors, _ = read_safetensors(path)
    _fill(weights_of(model), tensors, path)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file that is either whole or not there, also when the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, metadata
    )
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file.

    Raises:
        TrainingError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"{path} must be a whole safetensors file; {error}. Remove it, or copy it again."
        ) from error


def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    wrong = sorted(
        name
        for name in targets
        if name not in tensors or tensors[name].shape != targets[name].shape
    )
    if wrong:
        raise TrainingError(
            f"{path} must fit the model; {wrong[0]} does not. Use the settings it was trained with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


# State


def save_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    done: int,
    losses: list[float],
    out_dir: Path,
) -> None:
    """Write weights and optimiser state in one file, so that they can never be of two steps."""
    tensors = {f"weight/{name}": weight for name, weight in weights_of(model).items()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
    run = {"step": done, "settings": asdict(config), "losses": losses}
    # one entry only: safetensors writes several in no fixed order, and runs are compared by bytes
    write_safetensors(tensors, out_dir / "resume.safetensors", {"run": json.dumps(run)})


def resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, out_dir: Path
) -> tuple[int, list[float]]:
    """Take up the run in ``out_dir``; return its updates and the losses not yet reported."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "resume.safetensors"
    if not path.exists():
        return 0, []
    tensors, metadata = read_safetensors(path)
    run = json.loads(metadata["run"])
    _refuse_other_settings(run["settings"], config, run["step"], path)
    _fill({f"weight/{name}": weight for name, weight in weights_of(model).items()}, tensors, path)
    for name, weight in model.named_parameters():
        state = {
            # Adam keeps its count of steps on the CPU, wherever the weights are.
            key.split("/")[0]: value if key.startswith("step/") else value.to(weight.device)
            for key, value in tensors.items()
            if key.split("/", 1)[1] == name
        }
        state.pop("weight")
        if state:
            optimizer.state[weight] = state
    return run["step"], run["losses"]


def _refuse_other_settings(
    saved: dict[str, Any], config: TrainingConfig, done: int, path: Path
) -> None:
    """Allow another schedule as long as no learning rate so far would have been another."""
    free = ("n_steps", "decay_share", "final_lr_share", "save_every", "report_every")
    before = TrainingConfig(**{field.name: saved[field.name] for field in fields(config)})
    changed = [name for name in saved if name not in free and saved[name] != getattr(config, name)]
    if done > config.n_steps or any(
        lr_at(step, before) != lr_at(step, config) for step in range(done)
    ):
        changed.append("n_steps")
    if changed:
        raise TrainingError(
            f"a run is resumed with the settings it began with; {path} was made with "
            f"{changed[0]}={saved[changed[0]]}, not {getattr(config, changed[0])}. "
            "Set it so, or choose another folder."
        )


# Figures


def drop_lines_after(path: Path, step: int) -> None:
    """Forget the figures of steps that will be made again; a torn last line goes too."""
    kept = (
        [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        if step
        else []
    )
    fresh = path.with_suffix(".part")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


def read_metrics(path: Path) -> list[Figures]:
    """Return the lines of a metrics file, also of one that is just being written."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]
