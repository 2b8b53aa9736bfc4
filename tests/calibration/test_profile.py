"""ZeroTuning's profiles: finite, by gradient, and how the two rank."""

import dataclasses

import pytest
import torch

import workbench as wb
from tests.calibration.asked import questions
from workbench.calibration.effects import (
    Work,
    stock_answers,
)
from workbench.calibration.gradient import gradient_profile
from workbench.calibration.profile import (
    dominant_heads,
    finite_profile,
    profile_heads,
    rank_correlation,
)
from workbench.calibration.settings import Run, ZeroTuningCalibration
from workbench.errors import ConfigError


def test_the_gradient_is_that_of_small_gammas(model):
    asked = questions(6)
    for objective in ("accuracy", "entropy"):
        gradient = gradient_profile(model, asked, objective, 4, Work())
        step = 1e-2
        for layer, head in ((0, 1), (1, 3)):
            values = []
            for sign in (1, -1):
                gamma = float(torch.exp(torch.tensor(sign * step)))
                with model.edit(wb.ZeroTuning(gamma, ((layer, head),))):
                    answers = stock_answers(model, asked, 4, Work())
                values.append(answers.margin if objective == "accuracy" else -answers.entropy)
            numeric = float((values[0] - values[1]).mean()) / (2 * step)
            assert float(gradient[layer, head]) == pytest.approx(numeric, abs=2e-3)
        assert gradient.abs().max() > 0.01


def test_the_finite_profile_is_the_change_under_each_head_alone(model):
    asked = questions(7)
    config = ZeroTuningCalibration(objective="entropy", probe_gamma=2.5)
    heads = ((0, 0), (0, 3), (1, 1), (1, 2))
    effect = finite_profile(model, asked, heads, config, Run(3), Work())
    stock = stock_answers(model, asked, 7, Work()).entropy.mean()
    for head, found in zip(heads, effect.tolist(), strict=True):
        with model.edit(wb.ZeroTuning(2.5, (head,))):
            edited = stock_answers(model, asked, 7, Work()).entropy.mean()
        assert found == pytest.approx(float(stock - edited), abs=1e-4)
    other = dataclasses.replace(config, probe_gamma=1 / 2.5)
    down = finite_profile(model, asked, heads, other, Run(3), Work())
    assert rank_correlation(effect, down) > 0.5  # a probe below 1 is read the other way round


@pytest.mark.parametrize("objective", ["accuracy", "entropy"])
def test_the_rank_correlation_is_that_of_gradient_and_finite_profile(model, objective):
    from scipy.stats import spearmanr

    asked = questions(12)
    config = ZeroTuningCalibration(objective=objective, probe_gamma=1.02)
    profile = profile_heads(model, asked, config, Run(8), Work())
    assert profile.measured == tuple((layer, head) for layer in range(2) for head in range(4))
    proxy = gradient_profile(model, asked, objective, 8, Work()).flatten()
    document = profile.document()
    wanted = spearmanr(proxy.tolist(), profile.effect.tolist()).statistic
    assert document["gradient_rank_correlation"] == pytest.approx(wanted)
    assert document["profile"]["L1H2"] == pytest.approx(float(profile.effect[6]), rel=1e-5)
    if objective == "entropy":  # smooth: near gamma 1 the order is the derivative's
        assert wanted > 0.9
    assert rank_correlation(torch.zeros(4), torch.arange(4.0)) is None


def test_heads_chosen_by_gradient_are_verified_one_by_one(model):
    asked = questions(12)
    config = ZeroTuningCalibration(objective="entropy", profile="gradient", share=0.5)
    work = Work()
    profile = profile_heads(model, asked, config, Run(8), work)
    proxy = gradient_profile(model, asked, "entropy", 8, Work())
    assert (profile.is_up, profile.measured) == dominant_heads(proxy, 0.5)
    every = ZeroTuningCalibration(objective="entropy")
    whole = profile_heads(model, asked, every, Run(8), Work())
    for head in profile.measured:
        helps = (float(whole.effect[whole.measured.index(head)]) > 0) == profile.is_up
        assert (head in profile.heads) == helps
    # Less than the whole profile, which runs all eight heads.
    assert len(profile.measured) <= 4
    with pytest.raises(ConfigError, match="profile=gradient needs mode=score"):
        profile_heads(model, asked, dataclasses.replace(config, mode="key"), Run(8), Work())


def test_the_dominant_type_gives_the_strongest_heads_and_no_other():
    effect = torch.tensor([[0.3, -0.1, 0.2], [0.1, 0.0, -0.4]])
    assert dominant_heads(effect, 0.34) == (True, ((0, 0), (0, 2)))
    assert dominant_heads(effect, 1.0) == (True, ((0, 0), (0, 2), (1, 0)))
    assert dominant_heads(-effect, 0.17) == (False, ((0, 0),))
    assert dominant_heads(torch.zeros(2, 2), 0.5) == (True, ())
