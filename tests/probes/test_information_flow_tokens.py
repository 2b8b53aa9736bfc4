"""The arithmetic of representative tokens, removal and the redundancy classifier."""

import pytest
import torch

from probes.information_flow_tokens import (
    conditional,
    nearest_is_own,
    predict_redundant,
    relative_reduction,
    representative_tokens,
)
from workbench.errors import DataError


def test_a_token_must_score_enough_above_zero_and_above_its_rivals():
    score = torch.tensor([0.8, 0.79, 0.9, 0.9, -0.1])
    whole = torch.tensor([1.0, 1.0, 1.0, 1.0, -0.2])
    rival = torch.tensor([0.1, 0.1, 0.9, 0.89, -0.5])
    found = representative_tokens(score, whole, rival, 0.8)
    assert found.tolist() == [True, False, False, True, False]


def test_the_papers_error_arithmetic():
    # Card section 5: all redundant tokens removed, 83.48 -> 87.02 % right.
    assert relative_reduction(16.52, 12.98) == pytest.approx(0.214, abs=5e-4)
    # Leakage, FLUX-schnell 94 -> 14 %, FLUX-dev 79 -> 20 %.
    assert relative_reduction(94, 14) == pytest.approx(0.851, abs=5e-4)
    assert relative_reduction(79, 20) == pytest.approx(0.747, abs=5e-4)
    with pytest.raises(DataError, match="above 0"):
        relative_reduction(0.0, 0.0)


def test_the_papers_removal_table_from_counts():
    # n = 339: 283 right before, 98.90 % of them after; 56 wrong, 25 % right after: 87.02 % in all
    # within the rounding of the table.
    before = torch.arange(339) < 283
    after = torch.cat([torch.arange(283) < 280, torch.arange(56) < 14])
    found = conditional(before, after)
    assert found["accuracy_before"] == pytest.approx(0.8348, abs=5e-5)
    assert found["unaffected"] == pytest.approx(0.9890, abs=5e-4)
    assert found["improved"] == pytest.approx(0.25)
    assert found["accuracy_after"] == pytest.approx(0.8702, abs=3e-3)
    assert found["error_reduction"] == pytest.approx(0.2, abs=0.02)


def test_what_has_no_case_is_left_out():
    right = torch.ones(3, dtype=torch.bool)
    assert set(conditional(right, right)) == {"accuracy_before", "accuracy_after", "unaffected"}
    assert "unaffected" not in conditional(~right, right)


def test_the_nearest_prototype_by_hand():
    score = torch.tensor([[[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.5, 0.5, 0.5]]])
    exists = torch.tensor([[True, True, False]])
    assert nearest_is_own(score, exists).tolist() == [[True, False, False]]


def planted_tokens(n_prompts=10, n_each=6, noise=0.5, signal=3.0):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(n_prompts).repeat_interleave(n_each)
    redundant = torch.arange(n_prompts * n_each) % 2 == 0
    rep = noise * torch.randn(len(prompt), 8, generator=generator)
    rep[:, 3] += signal * (2.0 * redundant - 1.0)
    return rep, redundant, prompt


def test_the_classifier_finds_a_planted_direction_and_nothing_in_noise():
    rep, redundant, prompt = planted_tokens()
    assert torch.equal(predict_redundant(rep, redundant, prompt, 5), redundant)
    rep, redundant, prompt = planted_tokens(n_prompts=40, signal=0.0)
    agreement = (predict_redundant(rep, redundant, prompt, 5) == redundant).float().mean()
    assert 0.35 < agreement < 0.65


def test_the_classifier_never_sees_the_prompt_it_predicts():
    # Features name the prompt, and the label is the prompt's own: only leakage could learn it.
    prompt = torch.arange(12).repeat_interleave(4)
    redundant = prompt % 2 == 0
    rep = torch.nn.functional.one_hot(prompt, 12).float() * 10.0
    found = predict_redundant(rep, redundant, prompt, 12)
    assert not (found == redundant).any()


def test_too_few_prompts_or_one_class_is_refused():
    rep, redundant, prompt = planted_tokens(n_prompts=3)
    with pytest.raises(DataError, match="5 prompts; got 3"):
        predict_redundant(rep, redundant, prompt, 5)
    with pytest.raises(DataError, match="got 18 redundant of 18"):
        predict_redundant(rep, torch.ones_like(redundant), prompt, 3)
