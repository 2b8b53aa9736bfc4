"""A run: what it records, that it resumes, what it refuses, and the paper's findings."""

import dataclasses
import json
import shutil
from dataclasses import replace

import pytest
import torch

import workbench as wb
from toy_tasks.bigram_backcopy import (
    BigramBackcopyConfig,
    BigramBackcopyResult,
    train_bigram_backcopy,
)
from toy_tasks.training import Progress, TrainingError, checkpoint_steps, read_metrics
from workbench.discovery import find_probe
from workbench.errors import ConfigError
from workbench.registry import get_probe
from workbench.result import Result

TINY = BigramBackcopyConfig(
    n_pos=16, d_model=16, n_heads=2, batch_size=4, steps=24, n_held_out=8, seed=1
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigram") / "toy"
    return train_bigram_backcopy(TINY, folder), folder


def test_it_records_what_the_contract_names(tiny):
    found, _ = tiny
    n = len(checkpoint_steps(TINY.training()))
    assert found.step.tolist() == checkpoint_steps(TINY.training())
    norms = [f"{kind}_norm_{where}" for kind in ("value", "resid") for where in ("bos", "rest")]
    for name in ["sink_attention", "sink_logit_gap", *norms, "backcopy_risk", "bigram_risk"]:
        assert getattr(found, name).shape == (n,), name
        assert getattr(found, name).isfinite().all(), name
    assert found.backcopy_risk_ablated.shape == (len(found.labels["ablation"]), n)
    assert found.sample_tokens.shape == (8, 17)
    assert found.transition.shape == (66, 66)
    assert found.triggers.tolist() == [1, 43, 58]


def test_it_keeps_patterns_of_a_few_checkpoints(tiny):
    found, folder = tiny
    steps = found.pattern_step.tolist()
    assert steps[0] == 0
    assert steps[-1] == 24
    assert set(steps) <= set(found.step.tolist())
    assert found.pattern.shape == (len(steps), 1, 2, 16, 16)
    assert torch.allclose(found.pattern.sum(dim=-1), torch.ones(len(steps), 1, 2, 16))
    model = wb.load(f"toy:{folder}")
    again = model.capture(found.sample_tokens[:1, :-1], ["L0.pattern"])["L0.pattern"]
    assert torch.allclose(found.pattern[-1, 0], again[0], atol=1e-6)


def test_three_blocks_have_a_minimal_circuit_and_fewer_have_none(tiny, tmp_path):
    assert tiny[0].backcopy_risk_circuit is None
    found = train_bigram_backcopy(replace(TINY, n_layers=3, steps=2), tmp_path / "toy")
    assert found.labels["circuit"] == ("whole", "minimal", "no_block:L0")
    assert found.backcopy_risk_circuit[0] == found.backcopy_risk[-1]
    row = found.labels["ablation"].index("no_attention:L2")
    assert found.bigram_risk_circuit[1] == pytest.approx(found.bigram_risk_ablated[row, -1].item())


def test_the_part_without_which_the_peak_falls_most_makes_it(tiny):
    found, _ = tiny
    names = found.labels["ablation"]
    peak = torch.ones_like(found.resid_peak_ablated)
    peak[names.index("no_attention:L0"), 0] = 0.0  # before the end
    peak[names.index("no_mlp:L0"), -1] = 0.25
    peak[names.index("zero_head:L0H0")] = 0.125  # a head is a part of attention, none of its own
    assert replace(found, resid_peak_ablated=peak).peak_maker() == "no_mlp:L0"


def test_it_is_a_toy_task_whose_result_survives_storing(tiny, tmp_path):
    found, _ = tiny
    task = find_probe("bigram-backcopy")
    assert task is get_probe("bigram-backcopy")
    assert task.is_toy
    assert (task.config, task.result) == (BigramBackcopyConfig, BigramBackcopyResult)
    result = Result.from_measurement(task, found, key="ab" * 32, provenance={"model": "toy"})
    again = wb.Store(tmp_path).publish(result)
    assert again.ablations[0] == "no_attention:L0"
    assert again.measured.metrics() == found.metrics()
    assert again.measured.config == TINY
    assert torch.equal(again.sink_attention, found.sink_attention)


def test_every_setting_explains_itself():
    for field in dataclasses.fields(BigramBackcopyConfig):
        assert field.metadata["help"] == field.metadata["help"].rstrip(".")


def test_the_sink_probe_agrees_with_the_record(tiny):
    found, folder = tiny
    data = folder / "sample.safetensors"
    probed = wb.run("attention-sinks", f"toy:{folder}", str(data))
    ours, theirs = found.metrics(), probed.metrics()
    assert theirs["value_drain"] == pytest.approx(ours["value_drain"], rel=1e-5)
    assert theirs["resid_peak_ratio"] == pytest.approx(ours["resid_peak_ratio"], rel=1e-5)
    model = wb.load(f"toy:{folder}")
    tokens = found.sample_tokens[:, :-1]
    pattern = model.capture(tokens, ["L0.pattern"])["L0.pattern"]
    is_trigger = torch.isin(tokens, found.triggers)
    judged = (~is_trigger).float()
    judged[:, :2] = 0.0
    mean = (pattern[..., 0].mean(dim=1) * judged).sum() / judged.sum()
    assert mean.item() == pytest.approx(ours["sink_attention"], rel=1e-5)
    received = pattern[..., 0].mean().item()
    assert theirs["mean_score"] == pytest.approx(received, rel=1e-5)


def test_metrics_and_sequences_are_there_while_it_trains(tmp_path):
    lines, has_sequences = [], []

    def look(progress: Progress) -> None:
        has_sequences.append((tmp_path / "toy" / "sample.safetensors").is_file())
        lines.append(read_metrics(tmp_path / "toy" / "metrics.jsonl")[-1])

    train_bigram_backcopy(TINY, tmp_path / "toy", look)
    assert has_sequences == [True] * len(lines)
    assert lines[0]["step"] == 0
    assert lines[-1]["step"] == 24
    assert {"sink_attention", "backcopy_risk", "loss", "value_drain"} <= set(lines[-1])


@pytest.mark.parametrize("stop", [10, 17])
def test_a_stopped_run_ends_with_the_same_bits(tiny, tmp_path, stop):
    found, folder = tiny

    def interrupt(progress: Progress) -> None:
        if progress.step >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bigram_backcopy(TINY, tmp_path / "cut", interrupt)
    again = train_bigram_backcopy(TINY, tmp_path / "cut")
    for file in ("model.safetensors", "config.json", "sample.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (folder / file).read_bytes(), file
    for field in dataclasses.fields(found):
        first, second = getattr(found, field.name), getattr(again, field.name)
        if isinstance(first, torch.Tensor):
            assert torch.equal(first.nan_to_num(), second.nan_to_num()), field.name


def test_a_folder_of_another_run_is_refused_and_a_longer_run_goes_on(tiny, tmp_path):
    _, folder = tiny
    copy = tmp_path / "toy"
    shutil.copytree(folder, copy)
    with pytest.raises(TrainingError, match="another attention"):
        train_bigram_backcopy(replace(TINY, attention="relu"), copy)
    longer = train_bigram_backcopy(replace(TINY, steps=30), copy)
    whole = train_bigram_backcopy(replace(TINY, steps=30), tmp_path / "whole")
    assert torch.equal(longer.backcopy_risk[-1], whole.backcopy_risk[-1])


def test_a_rate_that_diverges_is_told_with_its_step_and_what_was_done_is_kept(tmp_path):
    with pytest.raises(TrainingError, match=r"at step \d+ .*lower lr"):
        train_bigram_backcopy(replace(TINY, lr=1e4), tmp_path / "toy")
    assert (tmp_path / "toy" / "checkpoints" / "step_00000000.safetensors").is_file()
    assert read_metrics(tmp_path / "toy" / "metrics.jsonl")[0]["step"] == 0


@pytest.mark.parametrize(
    "variant",
    [
        {"attention": "relu", "optimizer": "adam"},
        {"attention": "elu-normalised", "bias": "key-value", "positions": "rotary"},
        {"optimizer": "sgd", "norm": "post", "n_layers": 2},
        {"mlp": False, "bias": "sink-token", "positions": "none"},
        {"attention": "softmax-scale", "row_sum": 0.5, "triggers": "the"},
    ],
    ids=str,
)
def test_every_variant_trains(tmp_path, variant):
    found = train_bigram_backcopy(replace(TINY, **variant, steps=3), tmp_path / "toy")
    assert found.bigram_risk.isfinite().all()
    wb.load(f"toy:{tmp_path / 'toy'}").logits(found.sample_tokens[:, :-1])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"n_pos": 2}, {"attention": "none"}, {"lr": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_an_impossible_law_leaves_no_folder(tmp_path):
    for triggers in (0, 65):
        with pytest.raises(ConfigError, match="triggers"):
            train_bigram_backcopy(replace(TINY, triggers=triggers), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_the_config_of_the_folder_tells_the_run(tiny):
    _, folder = tiny
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["model_type"] == "toy"
    assert described["tokens"][-1] == "<s>"
    assert BigramBackcopyConfig(**described["run"]) == TINY
