import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from toy_tasks.training import (
    LossAt,
    Progress,
    TrainingConfig,
    TrainingError,
    batch_generator,
    checkpoint_steps,
    load_weights,
    lr_at,
    read_metrics,
    train,
    weights_of,
)
from workbench.errors import WorkbenchError

CONFIG = TrainingConfig(n_steps=40, lr=0.05, warmup_steps=5, save_every=7, report_every=9, seed=3)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def noisy_square_loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
    inputs = torch.randn(16, 3, generator=generator)
    return (model(inputs) - inputs.prod(dim=1, keepdim=True)).square().mean()


def trained(folder: Path, config: TrainingConfig = CONFIG) -> dict[str, Tensor]:
    net = make_net()
    train(net, noisy_square_loss, config, folder)
    return {name: weight.detach().clone() for name, weight in weights_of(net).items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def stop_at(n_updates: int) -> LossAt:
    """Press Ctrl-C while update number ``n_updates`` is being made."""

    def loss_at(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        if step + 1 == n_updates:
            os.kill(os.getpid(), signal.SIGINT)
        return noisy_square_loss(model, step, generator)

    return loss_at


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_interrupted_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, optimizer: str
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole = trained(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), stop_at(23), config, tmp_path / "cut")
    assert same_bits(trained(tmp_path / "cut", config), whole)
    for file in ("metrics.jsonl", "checkpoints/step_00000040.safetensors", "resume.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_interrupt_finishes_and_saves_the_step_in_hand(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), stop_at(23), CONFIG, tmp_path)
    steps = []
    train(
        make_net(),
        noisy_square_loss,
        CONFIG,
        tmp_path,
        progress=lambda progress: steps.append(progress.step),
    )
    assert steps == [27, 32, 36, 40]


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import test_training as here
from toy_tasks.training import train

def slow_loss(model, step, generator):
    time.sleep(0.02)
    return here.noisy_square_loss(model, step, generator)

train(here.make_net(), slow_loss, here.CONFIG, Path({folder!r}))
"""


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, folder = trained(tmp_path / "whole"), tmp_path / "killed"
    program = KILLED_RUN.format(here=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        _wait_for(folder / "checkpoints" / "step_00000016.safetensors", process)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "checkpoints" / "step_00000040.safetensors").exists()
    assert same_bits(trained(folder), whole)
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(
        tmp_path / "whole" / "metrics.jsonl"
    )


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_torn_last_line_of_the_metrics_is_dropped_on_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), stop_at(23), CONFIG, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 27, "lo')
    trained(tmp_path)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = trained(tmp_path)

    def never(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("no batch must be drawn")

    net = make_net()
    train(net, never, CONFIG, tmp_path)
    assert same_bits(dict(weights_of(net)), first)


def test_batches_depend_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> Tensor:
        return torch.rand(4, generator=batch_generator(seed, step))

    assert torch.equal(draw(1, 5), draw(1, 5))
    assert not torch.equal(draw(1, 5), draw(1, 6))
    assert not torch.equal(draw(1, 5), draw(2, 5))


def test_other_seed_ends_elsewhere(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    assert not same_bits(first, trained(tmp_path / "second", replace(CONFIG, seed=4)))


def test_checkpoints_double_from_one_and_include_both_ends() -> None:
    config = TrainingConfig(n_steps=100, checkpoints_per_doubling=1.0)
    assert checkpoint_steps(config) == [0, 1, 2, 4, 8, 16, 32, 64, 100]
    assert checkpoint_steps(replace(config, checkpoints_per_doubling=2.0))[:7] == [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
    ]


def test_checkpoint_of_every_scheduled_step_is_kept_and_loads(tmp_path: Path) -> None:
    last = trained(tmp_path)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [int(file.stem[5:]) for file in files] == checkpoint_steps(CONFIG)
    assert same_bits(
        load_file(files[0]),
        {name: weight.detach() for name, weight in weights_of(make_net()).items()},
    )
    net = make_net()
    load_weights(net, files[-1])
    assert same_bits({name: weight.detach() for name, weight in weights_of(net).items()}, last)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainingConfig(
        n_steps=100, lr=1.0, warmup_steps=9, decay_share=0.2, final_lr_share=0.1
    )
    assert lr_at(0, config) == pytest.approx(0.1)
    assert lr_at(9, config) == lr_at(50, config) == lr_at(80, config) == 1.0
    assert lr_at(90, config) == pytest.approx(0.55)
    assert lr_at(99, config) == pytest.approx(0.1 + 0.9 * 0.05)


def test_run_can_be_shortened_before_its_rate_falls_and_equals_the_short_run(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), stop_at(11), replace(CONFIG, n_steps=60), tmp_path / "shortened")
    assert same_bits(trained(tmp_path / "shortened"), trained(tmp_path / "short"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"lr": 0.01}, "lr"), ({"n_steps": 20}, "n_steps"), ({"seed": 9}, "seed")],
)
def test_resuming_with_other_settings_is_refused(
    tmp_path: Path, changed: dict[str, float], named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), stop_at(17), CONFIG, tmp_path)
    with pytest.raises(TrainingError, match=f"{named}="):
        trained(tmp_path, replace(CONFIG, **changed))


def test_divergence_stops_names_the_step_and_keeps_what_was_finished(tmp_path: Path) -> None:
    factors = iter([1.0] * 11 + [math.inf])

    def loss_at(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        return noisy_square_loss(model, step, generator) * next(factors)

    with pytest.raises(WorkbenchError, match=r"at step 11 the loss is inf.*lower lr"):
        train(make_net(), loss_at, CONFIG, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 11
    assert all(
        weight.isfinite().all() for weight in load_file(tmp_path / "resume.safetensors").values()
    )


def test_an_infinite_gradient_under_a_finite_loss_is_refused_before_anything_is_saved(
    tmp_path: Path,
) -> None:
    class RootAtZero(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, grad: Tensor) -> Tensor:
            return grad * math.inf

    def loss_at(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        loss = noisy_square_loss(model, step, generator)
        return RootAtZero.apply(loss) if step == 39 else loss

    with pytest.raises(TrainingError, match=r"weights must stay finite; after step 40 0\.weight"):
        train(make_net(), loss_at, replace(CONFIG, grad_clip=math.inf), tmp_path)
    with pytest.raises(TrainingError, match=r"at step 39 .* gradient norm"):
        train(make_net(), loss_at, CONFIG, tmp_path / "clipped")
    assert not (tmp_path / "checkpoints" / "step_00000040.safetensors").exists()
    saved = load_file(tmp_path / "resume.safetensors").values()
    assert all(weight.isfinite().all() for weight in saved)


def test_damaged_state_is_refused_in_one_line(tmp_path: Path) -> None:
    trained(tmp_path)
    state = tmp_path / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(TrainingError, match="must be a whole safetensors file") as caught:
        trained(tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_can_be_read_and_progress_seen_while_it_runs(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == progress.step
        seen.append((progress.step, progress.n_steps))

    train(
        make_net(),
        noisy_square_loss,
        CONFIG,
        tmp_path,
        measure=lambda model: {"size": 1.0},
        progress=watch,
    )
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["size"] == 1.0


def test_tied_weight_is_kept_once_and_restored_in_both_places(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        net[1].weight = net[0].weight
        return net

    first, second = tied(), tied()
    train(
        first,
        lambda model, step, generator: model(torch.ones(1, 4)).square().sum(),
        CONFIG,
        tmp_path,
    )
    load_weights(second, tmp_path / "checkpoints" / "step_00000040.safetensors")
    assert torch.equal(second[1].weight, first[0].weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_steps", 0), ("lr", -1.0), ("decay_share", 1.5), ("seed", -1), ("optimizer", "lion")],
)
def test_impossible_setting_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
        TrainingConfig(**{name: value})
