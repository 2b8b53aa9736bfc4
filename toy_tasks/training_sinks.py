"""Where the figures of a training run can be sent besides metrics.jsonl.

A sink is told what the terminal is told: the figures of a step. It changes nothing in the run, and
a run without one imports nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toy_tasks.training import Progress
from workbench.errors import ConfigError, UnknownNameError

SINKS = ("tensorboard", "wandb")
"""What figures can be sent to."""

Tell = Callable[[Progress], None]


@contextmanager
def open_sink(name: str, task: str, folder: Path, settings: dict[str, Any]) -> Iterator[Tell]:
    """Send figures to TensorBoard (files in ``folder/tensorboard``) or Weights & Biases.

    Weights & Biases obeys its own environment variables (WANDB_MODE=offline keeps everything here);
    its files go to ``folder/wandb``.

    Args:
        name: One of SINKS.
        task: The toy task; the project's name.
        folder: Of the run.
        settings: Those that were given, kept with the run.

    Raises:
        UnknownNameError: There is no such sink.
        ConfigError: Its library is not installed.
    """
    if name not in SINKS:
        raise UnknownNameError("sink", name, SINKS)
    opened = _tensorboard(folder) if name == "tensorboard" else _wandb(task, folder, settings)
    with opened as tell:
        yield tell


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Tell]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _not_installed("tensorboard") from error
    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def tell(progress: Progress) -> None:
            for figure, value in numbers(progress).items():
                writer.add_scalar(figure, value, progress.step)
            writer.flush()

        yield tell


@contextmanager
def _wandb(task: str, folder: Path, settings: dict[str, Any]) -> Iterator[Tell]:
    try:
        import wandb
    except ImportError as error:
        raise _not_installed("wandb") from error
    project = f"workbench-{task}"
    with wandb.init(project=project, name=folder.name, dir=str(folder), config=settings) as run:
        yield lambda progress: run.log(numbers(progress), step=progress.step)


def numbers(progress: Progress) -> dict[str, float]:
    """The figures that are finite numbers; the step is told apart."""
    return {
        name: float(value)
        for name, value in progress.figures.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _not_installed(library: str) -> ConfigError:
    return ConfigError(
        f"the sink {library} needs {library}, which is not installed; pip install "
        "'interpretability-workbench[sinks]', or leave --sink out"
    )
