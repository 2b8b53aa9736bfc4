"""What the paper found is found again: one run of each kind at the default size, about 20 s each.

Seeds differ (docs/toy_results.md has their spread); thresholds lie far from where these end.
"""

from dataclasses import replace

import pytest
import torch

import workbench as wb
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, train_bigram_backcopy

SETTINGS = BigramBackcopyConfig(seed=3)


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("softmax") / "toy"
    return train_bigram_backcopy(SETTINGS, folder), folder


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    config = replace(SETTINGS, attention="relu", seed=0)
    return train_bigram_backcopy(config, tmp_path_factory.mktemp("relu") / "toy")


def test_a_softmax_head_parks_on_the_first_token_and_drains_its_value(softmax):
    found = softmax[0].metrics()
    assert found["sink_attention"] > 0.7
    assert found["value_drain"] < 0.26
    assert found["backcopy_risk"] < 0.05
    assert found["bigram_risk"] < 0.06


def test_attention_is_needed_after_triggers_and_nowhere_else(softmax):
    found = softmax[0].metrics()
    assert found["backcopy_risk_no_attention"] > 3.0
    assert abs(found["bigram_risk_no_attention"] - found["bigram_risk"]) < 0.02


def test_without_its_mlp_the_model_forgets_the_bigrams(softmax):
    run = softmax[0]
    row = run.labels["ablation"].index("no_mlp:L0")
    assert run.bigram_risk_ablated[row, -1] > 1.0


def test_sink_logit_and_drain_grow_together(softmax):
    run = softmax[0]
    early, late = run.step.tolist().index(64), -1
    drain = run.value_norm_bos / run.value_norm_rest
    assert run.sink_logit_gap[late] > run.sink_logit_gap[early] + 5.0
    assert drain[late] < 0.5 * drain[early]
    # Theory's resting value comes down onto the measured one from far above.
    far = run.value_norm_stationary / run.value_norm_bos
    assert far[early] > 1.5
    assert far[late] < 1.0


def test_the_kept_pattern_rests_on_the_first_token_and_copies_after_triggers(softmax):
    run = softmax[0]
    pattern, tokens = run.pattern[-1, 0, 0], run.sample_tokens[0, :-1]
    is_trigger = torch.isin(tokens, run.triggers)
    after = is_trigger.nonzero()[:, 0]
    assert pattern[after, after - 1].mean() > 0.9
    resting = ~is_trigger
    resting[:2] = False
    assert pattern[resting, 0].mean() > 0.6


@pytest.mark.slow
def test_a_relu_head_has_no_sink_and_no_drain(relu):
    found = relu.metrics()
    assert found["sink_attention"] < 0.01
    assert found["value_drain"] > 0.4
    assert found["backcopy_risk"] < 0.05
    # Its scores at <s> are all the same to it: they are cut off.
    spread = relu.sink_logit_spread_by_layer[-1] / relu.other_logit_spread_by_layer[-1]
    assert spread.item() < 0.5


def test_the_sink_probe_finds_the_trained_sink(softmax):
    run, folder = softmax
    probed = wb.run(
        "attention-sinks", f"toy:{folder}", str(folder / "sample.safetensors")
    ).metrics()
    assert probed["sink_rate"] > 0.9
    assert probed["value_drain"] == pytest.approx(run.metrics()["value_drain"], rel=1e-5)


@pytest.mark.slow
def test_three_blocks_raise_a_residual_peak_which_the_first_mlp_makes(tmp_path):
    """Five minutes on one core."""
    config = replace(SETTINGS, n_layers=3, seed=0, lr=1e-3, steps=4000)
    run = train_bigram_backcopy(config, tmp_path / "toy")
    assert run.peak_maker() == "no_mlp:L0"
    whole, _, without = run.labels["circuit"]
    assert (whole, without) == ("whole", "no_block:L0")
    gap, value, norm = (
        run.sink_logit_gap_circuit,
        run.value_norm_bos_circuit,
        run.resid_norm_excess_circuit,
    )
    assert gap[2] < gap[0] - 3.0
    assert value[2] > 3 * value[0]
    assert norm[2] < 0.2 * norm[0]
