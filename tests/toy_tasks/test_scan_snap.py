"""The scan-snap run: the published numbers and signs, the snap detector, stopping and going on."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch
from safetensors.torch import load_file

from toy_tasks import scan_snap, scan_snap_run
from toy_tasks.scan_snap import ScanSnapConfig, ScanSnapResult, snap_step, train_scan_snap
from toy_tasks.scan_snap_theory import distinct_invariant
from toy_tasks.training import Progress, TrainingError, read_metrics
from workbench.discovery import find_probe
from workbench.provenance import content_key
from workbench.result import Result

SEEDS = (0, 1, 2)
FEW = ScanSnapConfig(steps=12, batch_size=8, n_pos=16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The small set, by ratio and seed."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        (ratio, seed): train_scan_snap(
            ScanSnapConfig(lr_ratio=ratio, seed=seed), folder / f"{ratio}-{seed}"
        )
        for ratio in (1.0, 10.0)
        for seed in SEEDS
    }


# Section 6 of the method card: loss log, masses, orderings, signs


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_are_the_published_ones(runs, seed):
    loss = runs[1.0, seed].loss
    assert loss[0].item() == pytest.approx(torch.tensor(34.0).log().item(), rel=1e-6)
    for step, published in ((0, 3.5264), (2, 2.368), (4, 0.733)):
        assert loss[step].item() == pytest.approx(published, rel=0.03)
    # Later the batches differ more than 3 %: the published order of magnitude.
    for step, published in ((6, 0.161), (10, 0.0130), (20, 2.1e-4), (50, 2.6e-5), (98, 2.2e-5)):
        assert published / 2 < loss[step].item() < 2 * published


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_leaves_common_tokens_for_the_frequent_distinct_ones(runs, seed):
    result = runs[1.0, seed]
    law = result.law()
    for row in range(2):
        z = result.class_z()[-1, row]
        distinct = z[law.is_distinct[row]]
        # In 127 tokens the rarest distinct one is hardly ever twice, so its z stays about 0.
        assert (distinct > -0.03).all()
        assert (distinct[5:] > 0.2).all()
        ranks = distinct.argsort().argsort()
        assert torch.corrcoef(torch.stack([ranks, torch.arange(10)]).float())[0, 1] > 0.97
        assert (z[law.is_common[row]] < 0).all()
        weights = result.attention[-1, row][law.is_distinct[row]]
        assert (weights.diff() > 0).all()
    assert result.z.sum(dim=-1).abs().max() < 1e-5  # float32 of a sum that is 0


@pytest.mark.slow
def test_in_long_sequences_distinct_tokens_grow_exactly_in_the_order_of_their_frequency(tmp_path):
    config = ScanSnapConfig(lr_ratio=10.0, n_pos=1024, batch_size=512)
    result = train_scan_snap(config, tmp_path)
    law = result.law()
    for row in range(2):
        z = result.class_z()[-1, row]
        assert (z[law.is_distinct[row]] > 0).all()
        assert (z[law.is_distinct[row]].diff() > 0).all()
        assert (z[law.is_common[row]] < 0).all()
        own = law.is_distinct[row]
        kappa = distinct_invariant(z[own].double(), law.prob[row, own])
        assert (kappa.max() - kappa.min()) / (kappa.max() + kappa.min()) < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_faster_decoder_leaves_attention_less_sparse(runs, seed):
    slow, fast = runs[1.0, seed], runs[10.0, seed]
    assert fast.entropy[-1] > slow.entropy[-1]
    for result, mass in ((slow, 0.386), (fast, 0.534)):
        common = result.common_mass()
        assert common[0].item() == pytest.approx(10 / 15.5)
        assert common[-1].item() == pytest.approx(mass, rel=0.07)
    assert slow.entropy[-1].item() == pytest.approx(1.916, rel=0.03)
    assert fast.entropy[-1].item() == pytest.approx(2.065, rel=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_snaps(runs, seed):
    result = runs[1.0, seed]
    change = [(result.z[t + 5] - result.z[t]).abs().max().item() for t in (5, 20, 50, 90)]
    # Late changes are those of a few rare batches, which differ from seed to seed.
    for found, published in zip(change, (0.377, 0.119, 0.005, 0.0003), strict=True):
        assert published / 3 < found < 3 * published
    assert 20 < result.snap_step < 50


def test_row_sums_stay_zero_in_float64(tmp_path):
    train_scan_snap(ScanSnapConfig(steps=100), tmp_path)
    model = load_file(tmp_path / "model.safetensors")
    assert model["Z"].dtype == torch.float64
    for matrix in (model["Y"], model["Z"]):
        assert matrix.sum(dim=-1).abs().max() < 1e-12


def test_with_adam_the_rate_decides_which_distinct_tokens_win(tmp_path):
    """The paper's Fig. 5: eta_Y = eta_Z in 0.1, 0.5, 1 each choose another subset."""
    winners = []
    for rate in (0.1, 0.5, 1.0):
        config = ScanSnapConfig(optimizer="adam", lr_z=rate)
        result = train_scan_snap(config, tmp_path / str(rate))
        weights = result.attention[-1][result.law().is_distinct].view(2, 10)
        winners.append({row.topk(3).indices.sort().values.tolist()[0] for row in weights})
        assert result.loss[-1] < 1e-2
    rare, middle, frequent = winners
    assert frequent == {7}
    assert max(rare) < min(middle) <= max(middle) < 7


# What is derived from the record


def test_entropy_and_growth_start_where_the_law_says(runs):
    result = runs[1.0, 0]
    weight = torch.linspace(0.1, 1, 10) / 5.5
    assert result.entropy[0].item() == pytest.approx(-(weight * weight.log()).sum().item())
    assert (result.growth()[0] == 1).all()
    chi = result.growth()[-1]
    torch.testing.assert_close(chi, (2 * result.z[-1]).exp())


def test_snap_is_the_first_step_whose_change_is_small_beside_its_peak():
    step = torch.arange(21)
    z = torch.zeros(21, 1, 2)
    # Moves by 1 a step, then from step 10 by 0.04 a step: 5 steps cover 0.2 = 4 % of 5.
    z[:, 0, 0] = torch.where(step <= 10, step.float(), 10 + 0.04 * (step - 10))
    assert snap_step(step, z) == 10
    z[:, 0, 1] = 0.06 * step  # 5 steps cover 0.3 = 6 %
    assert snap_step(step, z) == -1
    assert snap_step(10 * step, z * torch.tensor([1.0, 0.0])) == 100


def test_a_slow_start_is_no_snap():
    step = torch.arange(31)
    z = torch.zeros(31, 1, 1)
    z[:, 0, 0] = 0.01 * step + (step - 10).clamp(0, 10)
    assert snap_step(step, z) == 20


def test_far_checkpoints_are_compared_with_the_next_one():
    z = torch.tensor([0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None, None]
    assert snap_step(10 * torch.arange(8), z) == 20
    assert snap_step(torch.arange(8), z) == -1


def test_too_short_a_run_cannot_snap():
    assert snap_step(torch.arange(3), torch.zeros(3, 1, 2)) == -1


def test_shapes_are_those_of_the_contract(tmp_path):
    config = replace(FEW, n_queries=3, n_classes_per_query=2, record_every=5)
    result = train_scan_snap(config, tmp_path)
    assert result.step.tolist() == [0, 5, 10, 12]
    assert result.loss.shape == result.entropy.shape == (4,)
    assert result.z.shape == (4, 3, config.n_tokens)
    assert result.attention.shape == (4, 6, config.n_tokens)
    torch.testing.assert_close(result.attention.sum(dim=-1), torch.ones(4, 6))
    assert result.snap_step.shape == ()
    assert [len(column) for column in result.table().values()] == [6] * 7
    values = torch.tensor(list(result.metrics().values()))
    assert values.isfinite().all()


def test_a_run_without_common_tokens_has_no_common_mass(tmp_path):
    result = train_scan_snap(replace(FEW, n_common=0), tmp_path)
    assert result.metrics()["common_mass"] == 0


def test_it_is_a_result_like_any_other(tmp_path):
    task = find_probe("scan-snap")
    assert task.is_toy
    assert task.measure is train_scan_snap
    assert task.paper in (scan_snap.__doc__ or "")
    measured = train_scan_snap(FEW, tmp_path)
    result = Result.from_measurement(task, measured, key=content_key({}), provenance={})
    rebuilt = result.measured
    assert isinstance(rebuilt, ScanSnapResult)
    assert rebuilt.config == FEW
    assert torch.equal(rebuilt.z, measured.z)
    assert rebuilt.metrics() == measured.metrics()
    with pytest.raises(AttributeError):
        measured.loss = measured.entropy


def test_every_setting_has_a_line_of_help():
    for field in fields(ScanSnapConfig):
        assert field.metadata["help"]


# Stopping, going on, going wrong


def same(first, second):
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("step", "loss", "z", "attention", "entropy", "snap_step")
    )


class StopAt:
    """Presses Ctrl-C when a step is reported."""

    def __init__(self, step):
        self.step = step

    def __call__(self, progress):
        import signal

        if progress.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, stop, optimizer):
    config = replace(FEW, optimizer=optimizer)
    whole = train_scan_snap(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_scan_snap(config, tmp_path / "cut", StopAt(stop))
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert same(train_scan_snap(config, tmp_path / "cut"), whole)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in ("Y", "Z"))


def test_a_run_that_was_killed_goes_on_from_its_last_save(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_snap, "SAVE_EVERY", 5)
    whole = train_scan_snap(FEW, tmp_path / "whole")

    def crash(progress):
        if progress.step == 8:
            raise MemoryError

    with pytest.raises(MemoryError):
        train_scan_snap(FEW, tmp_path / "cut", crash)
    seen = []
    cut = train_scan_snap(FEW, tmp_path / "cut", lambda progress: seen.append(progress.step))
    assert seen[0] == 5
    assert same(cut, whole)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_a_finished_run_is_not_made_again_and_can_be_lengthened(tmp_path):
    config = replace(FEW, record_every=5)
    longer = replace(config, steps=20)
    train_scan_snap(config, tmp_path / "a")
    seen = []
    again = train_scan_snap(config, tmp_path / "a", seen.append)
    assert seen == []
    assert again.step.tolist() == [0, 5, 10, 12]
    lengthened = train_scan_snap(longer, tmp_path / "a")
    assert same(lengthened, train_scan_snap(longer, tmp_path / "b"))
    with pytest.raises(TrainingError, match="steps=20, not 12"):
        train_scan_snap(config, tmp_path / "a")


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    train_scan_snap(FEW, tmp_path)
    with pytest.raises(TrainingError, match=r"lr_z=1\.0, not 2\.0"):
        train_scan_snap(replace(FEW, lr_z=2.0), tmp_path)


def test_progress_and_metrics_can_be_read_while_it_runs(tmp_path):
    seen: list[Progress] = []

    def look(progress):
        seen.append(progress)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == progress.figures

    result = train_scan_snap(FEW, tmp_path, look)
    assert [one.step for one in seen] == list(range(13))
    assert [one.n_steps for one in seen] == [12] * 13
    assert seen[-1].seconds_left == 0
    assert seen[0].figures["loss"] == pytest.approx(result.loss[0].item())
    assert {"step", "loss", "entropy", "common_mass"} == set(seen[0].figures)


def test_a_long_run_reports_some_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_snap_run, "REPORTS", 3)
    seen = []
    train_scan_snap(FEW, tmp_path, lambda progress: seen.append(progress.step))
    assert seen == [0, 4, 8, 12]


def test_divergence_is_reported_with_its_step_and_keeps_what_was_recorded(tmp_path):
    # Rates this large overshoot once a batch has a class's rare mixture.
    config = ScanSnapConfig(lr_z=1e8, seed=0)
    with pytest.raises(TrainingError, match=r"under 35\.3 nats.* at step \d+ it is") as raised:
        train_scan_snap(config, tmp_path)
    step = int(str(raised.value).split("at step ")[1].split()[0])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert step - 2 <= lines[-1]["step"] < step
    assert max(line["loss"] for line in lines) < 35.3


def test_the_models_config_names_its_settings(tmp_path):
    train_scan_snap(FEW, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config == {"model_type": "scan-snap", "d_vocab": 34} | asdict(FEW)
