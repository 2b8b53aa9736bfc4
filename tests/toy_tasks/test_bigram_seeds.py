"""Runs of many seeds as one end where each ends alone."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import workbench as wb
from toy_tasks import bigram_seeds
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, train_bigram_backcopy
from toy_tasks.bigram_seeds import BigramSeeds, train_seeds
from workbench.errors import ConfigError

TINY = BigramBackcopyConfig(n_pos=12, d_model=16, batch_size=4, steps=20, n_held_out=8)
SEEDS = (0, 3, 11)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        pytest.param(
            replace(TINY, n_layers=2, n_heads=2, optimizer="adam", weight_decay=0.0),
            marks=pytest.mark.slow,
        ),
        replace(TINY, optimizer="sgd", lr=0.3, momentum=0.5, positions="rotary"),
        replace(TINY, attention="relu", bias="key-value", norm="post", weight_decay=0.5),
        replace(TINY, bias="sink-token", mlp=False),
    ],
    ids=["adamw", "adam-deep", "sgd-rotary", "relu-post", "sink-token"],
)
def test_each_seed_equals_its_single_run(tmp_path, config):
    together = train_seeds(config, SEEDS)
    for index, seed in enumerate(SEEDS):
        folder = tmp_path / str(seed)
        alone = train_bigram_backcopy(replace(config, seed=seed), folder)
        weights = load_file(folder / "model.safetensors")
        for name, weight in together.model(seed).state_dict().items():
            # 20 steps of Adam, which divides by small numbers, on two kernels for attention.
            torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)
        for name in ("sink_attention", "sink_logit_gap", "backcopy_risk", "bigram_risk"):
            found, wanted = getattr(together, name)[index], getattr(alone, name)[-1]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        drain = alone.metrics()["value_drain"]
        assert together.value_drain[index].item() == pytest.approx(drain, rel=1e-3)
    assert (together.loss.diff(dim=1).abs().amax(dim=0) > 1e-3).all(), "seeds differ"
    assert (together.diverged_at == -1).all()


def test_seeds_go_in_groups_that_fit_the_cache(monkeypatch):
    whole = train_seeds(replace(TINY, steps=3), SEEDS)
    assert bigram_seeds.seeds_at_once(TINY) == 2**20 // (4 * 12 * 64)
    assert bigram_seeds.seeds_at_once(replace(TINY, batch_size=10**6)) == 1
    monkeypatch.setattr(bigram_seeds, "WIDEST", 2 * 4 * 12 * 64)
    seen = []
    parts = train_seeds(replace(TINY, steps=3), SEEDS, lambda *told: seen.append(told[:2]))
    assert seen == [(step, 6) for step in range(1, 7)]
    torch.testing.assert_close(parts.loss, whole.loss)
    for seed in SEEDS:
        theirs = whole.model(seed).state_dict()
        for name, weight in parts.model(seed).state_dict().items():
            torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=0)


def test_a_run_that_diverges_is_marked_and_stops_no_other():
    config = replace(TINY, optimizer="sgd", lr=0.5, momentum=0.0)
    calm = train_seeds(config, (0, 1))
    wild = replace(config, lr=2e3)
    found = train_seeds(wild, (0, 1))
    assert (found.diverged_at >= 1).all()
    assert found.sink_attention.isnan().all()
    assert calm.sink_attention.isfinite().all()
    mixed = BigramSeeds(**{**vars(calm), "diverged_at": torch.tensor([-1, 4])})
    assert mixed.table()["diverged_at"] == [-1, 4]


def test_the_models_are_models_like_any_other():
    found = train_seeds(replace(TINY, steps=2), SEEDS)
    tokens = torch.zeros(1, 12, dtype=torch.long)
    logits = [wb.wrap(found.model(seed)).logits(tokens) for seed in SEEDS]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert len(found.table()["sink_attention"]) == 3
    with pytest.raises(ConfigError, match="one that was trained"):
        found.model(4)


def test_progress_is_told_of_every_step():
    seen = []
    train_seeds(replace(TINY, steps=3), (0, 1), lambda *told: seen.append(told))
    assert [told[:2] for told in seen] == [(1, 3), (2, 3), (3, 3)]
    assert 0 < seen[-1][2] < 10


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_impossible_seeds_are_refused(seeds):
    with pytest.raises(ConfigError, match="seeds must be distinct"):
        train_seeds(TINY, seeds)
