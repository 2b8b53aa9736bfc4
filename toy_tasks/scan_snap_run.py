"""One run of the scan-snap toy in its folder: it can be stopped, gone on with, and watched.

    resume.safetensors   weights, momentum and everything recorded so far
    metrics.jsonl        one JSON object a line, readable while it runs
    model.safetensors    at the end: Y and Z in float64; the settings are in config.json
    sample.safetensors   at the end: sequences for probes of the model

The batch of a step depends on (seed, step) alone, so that a run that was stopped ends with the same
bits as one that was not.

Paper: Tian et al. 2023, "Scan and Snap", arXiv:2305.16380.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toy_tasks.scan_snap_data import ScanSnapConfig, class_law, draw_batch, draw_sequences
from toy_tasks.scan_snap_dynamics import (
    Ascent,
    ascent,
    class_attention,
    common_mass,
    distinct_entropy,
    first_weights,
    forward,
    mean_loss,
)
from toy_tasks.training import (
    Figures,
    Progress,
    TrainingError,
    batch_generator,
    drop_lines_after,
    read_safetensors,
    write_safetensors,
)

SAVE_EVERY = 1000
"""Steps between two writings of the file to resume from."""
REPORTS = 50
"""Lines of progress in a run."""
WORST_LOSS = 10
"""Times ln M, the loss of guessing; beyond it a run counts as diverged."""
N_SAMPLE = 64
SAMPLE_STREAM = 1_000_000_005
"""The step whose randomness makes the sample; no run has so many."""
RESUME = "resume.safetensors"


class Run:
    """Weights, momentum and record of one run, in memory and in its folder."""

    def __init__(self, config: ScanSnapConfig, out_dir: Path) -> None:
        self.config, self.out_dir, self.law = config, out_dir, class_law(config)
        self.weights = first_weights(config, config.seed, torch.float64)
        rate = torch.tensor([config.lr_z], dtype=torch.float64)
        self.ascent = Ascent(config.optimizer, (rate * config.lr_ratio, rate), config.momentum)
        self.moments = self.ascent.start(self.weights)
        self.done = 0
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.z: list[Tensor] = []
        self._resume()

    @property
    def is_complete(self) -> bool:
        """The weights after the last update have been recorded."""
        return bool(self.steps) and self.steps[-1] == self.config.steps

    def advance(self) -> None:
        """Draw a batch, record its loss where one is due, and learn from it."""
        config, generator = self.config, batch_generator(self.config.seed, self.done)
        batch = draw_batch(self.law, (config.batch_size, config.n_pos - 1), [generator])
        attended = forward(self.weights, batch)
        if self.done % config.record_every == 0 or self.done == config.steps:
            loss = mean_loss(attended, batch).item()
            self._refuse_divergence(loss)
            self.steps.append(self.done)
            self.losses.append(loss)
            self.z.append(self.weights.Z[0].clone())
        if self.done < config.steps:
            slope = ascent(self.weights, batch, attended)
            self.ascent.step(self.weights, self.moments, slope, self.done)
            self.done += 1

    def _refuse_divergence(self, loss: float) -> None:
        worst = WORST_LOSS * math.log(self.config.n_tokens)
        if not loss <= worst:
            raise TrainingError(
                f"the loss must stay under {worst:.3g} nats, {WORST_LOSS} times that of guessing; at "
                f"step {self.done} it is {loss:.3g}. What was saved before is kept; train again in a "
                "new folder with a lower lr_z or lr_ratio."
            )

    def figures(self) -> Figures:
        """The newest checkpoint in numbers."""
        c = class_attention(self.z[-1][None], self.law)
        return {
            "step": self.steps[-1],
            "loss": self.losses[-1],
            "entropy": distinct_entropy(c, self.law).mean().item(),
            "common_mass": common_mass(c, self.law).mean().item(),
        }

    # Files

    def _matrices(self) -> dict[str, Tensor]:
        """Weights and what the ascent remembers, by their names in the file."""
        velocity, squares = self.moments
        pairs = {"": self.weights, "_velocity": velocity, "_squares": squares}
        return {
            f"{matrix}{role}": tensor
            for role, pair in pairs.items()
            if pair is not None
            for matrix, tensor in zip("YZ", pair, strict=True)
        }

    def save(self) -> None:
        """Write everything that is needed to go on."""
        record = {
            "step": torch.tensor(self.steps),
            "loss": torch.tensor(self.losses, dtype=torch.float64),
            "z": torch.stack(self.z),
        }
        run = json.dumps({"done": self.done, "settings": asdict(self.config)})
        write_safetensors(self._matrices() | record, self.out_dir / RESUME, {"run": run})

    def save_model(self) -> None:
        """Write the trained matrices and the settings they belong to."""
        tensors = {"Y": self.weights.Y[0], "Z": self.weights.Z[0]}
        write_safetensors(tensors, self.out_dir / "model.safetensors", {"format": "pt"})
        config = {"model_type": "scan-snap", "d_vocab": self.config.n_tokens}
        text = json.dumps(config | asdict(self.config), indent=1)
        (self.out_dir / "config.json").write_text(text + "\n", encoding="utf-8")
        generator = batch_generator(self.config.seed, SAMPLE_STREAM)
        tokens, _ = draw_sequences(self.law, (N_SAMPLE, self.config.n_pos - 1), generator)
        write_safetensors({"tokens": tokens}, self.out_dir / "sample.safetensors", {})

    def _resume(self) -> None:
        """Take up the run of the folder, if it holds one."""
        path = self.out_dir / RESUME
        if not path.exists():
            return
        tensors, metadata = read_safetensors(path)
        run = json.loads(metadata["run"])
        _refuse_other_settings(run, self.config, path)
        for name, matrix in self._matrices().items():
            matrix.copy_(tensors[name])
        self.done = run["done"]
        # A checkpoint made because the run was to end here may be none in a longer run.
        kept = tensors["step"] < self.done if self.done < self.config.steps else slice(None)
        self.steps, self.losses = tensors["step"][kept].tolist(), tensors["loss"][kept].tolist()
        self.z = list(tensors["z"][kept])


def _refuse_other_settings(run: dict[str, Any], config: ScanSnapConfig, path: Path) -> None:
    """Allow another number of steps, as long as they have not been made yet."""
    saved, asked = run["settings"], asdict(config)
    changed = [name for name in asked if name != "steps" and saved.get(name) != asked[name]]
    if run["done"] > config.steps:
        changed.append("steps")
    if changed:
        name = changed[0]
        raise TrainingError(
            f"a run is resumed with the settings it began with; {path} was made with "
            f"{name}={saved.get(name)}, not {asked[name]}. Set it so, or choose another folder."
        )


class Log:
    """metrics.jsonl and the lines of progress."""

    def __init__(self, run: Run, progress: Callable[[Progress], None] | None) -> None:
        self.run, self.progress = run, progress
        self.path = run.out_dir / "metrics.jsonl"
        self.every = max(1, run.config.steps // REPORTS)
        self.started, self.started_at_step = time.monotonic(), run.done
        self.next = run.done
        drop_lines_after(self.path, run.done if run.is_complete else run.done - 1)

    def write(self) -> None:
        """Write a line, if one is due and there is a checkpoint to write of."""
        run = self.run
        if not run.steps or (run.steps[-1] < self.next and not run.is_complete):
            return
        self.next = run.steps[-1] + self.every
        figures = run.figures()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        if self.progress:
            rate = (time.monotonic() - self.started) / max(run.done - self.started_at_step, 1)
            n_steps = run.config.steps
            self.progress(Progress(run.steps[-1], n_steps, figures, rate * (n_steps - run.done)))
