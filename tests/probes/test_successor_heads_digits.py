"""Digits planted in the representations: features, probe, steering and factoring must find them."""

import pytest
import torch

from probes.successor_heads_features import (
    SaeSettings,
    Span,
    coverage,
    fit_probe,
    held_out_accuracy,
    mean_cosine,
    modal,
    residue_features,
    residue_problem,
    selectivity,
    train_sae,
)
from probes.successor_heads_steering import (
    Steered,
    combinations,
    digit_logits,
    factoring_accuracy,
    fit_index_map,
    make_cells,
    names_next_digit,
    steer,
    steer_set,
    steering_targets,
)
from probes.successor_heads_tokens import Series, TokenSet

N = 100
INDEX = torch.arange(1, N + 1)
RESIDUE = INDEX % 10
NUMBERS = Series("numbers", tuple(str(i) for i in range(1, N + 1)))
MONTHS = Series("months", tuple("abcdefghijkl"), cyclic=True)
D_MODEL = 64


def all_of(series, form="space"):
    n_items = len(series.items)
    return TokenSet(series, form, tuple(range(1, n_items + 1)), tuple(range(n_items)))


def orthonormal(n_rows, d_model=D_MODEL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_model, n_rows, generator=generator))[0].T


PLANTED = orthonormal(10 + 11 + 3)
DIGITS, TENS, DOMAINS = PLANTED[:10], PLANTED[10:21], PLANTED[21:]


def planted(index, domain=0):
    return DIGITS[index % 10] + TENS[index // 10] + DOMAINS[domain]


def turning_head():
    """Sends digit r to r + 1 and keeps the rest."""
    turn = torch.eye(D_MODEL) - DIGITS.T @ DIGITS + DIGITS.T @ DIGITS.roll(-1, dims=0)
    return turn, torch.eye(D_MODEL)


# Features, by hand


def test_span_gives_back_what_lies_in_it():
    x = planted(INDEX)
    span = Span.of(x)
    coordinates = span.coordinates(x)
    # 10 digits and 11 tens, each set with one sum that never changes.
    assert coordinates.shape == (N, 9 + 10)
    torch.testing.assert_close(coordinates.square().sum(1).mean(), torch.tensor(1.0))
    back = span.mean + span.scale * coordinates @ span.basis
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    assert span.directions(torch.randn(3, 19)).norm(dim=1).tolist() == pytest.approx([1] * 3)


def test_selectivity_is_the_mean_inside_minus_the_mean_outside():
    residue = torch.arange(10).repeat(2)
    active = torch.zeros(20, 2)
    active[0, 0], active[10, 0], active[3, 0] = 4.0, 2.0, 9.0
    found = selectivity(active, residue)
    assert found[0].tolist() == pytest.approx([3.0 - 9.0 / 18, 0.0])
    assert found[3].tolist() == pytest.approx([4.5 - 6.0 / 18, 0.0])


def test_coverage_counts_the_modal_feature_and_no_silent_token():
    residue = torch.arange(10).repeat(4)
    active = torch.zeros(40, 3)
    active[residue == 0] = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 2.0, 1.0], [0, 0, 0]])
    active[residue == 1] = torch.tensor([0, 0, 1.0])
    assert coverage(active, residue) == pytest.approx((2 / 4 + 1 + 8 * 0) / 10)


def test_modal_feature_is_the_one_that_agrees_best():
    e = torch.eye(3)
    rows = torch.stack([e[:1], e[:1] + 0.1 * e[1:2], e[2:]])
    chosen, agreement = modal(rows)
    assert chosen[0, 2] == 0
    cosine = 1 / 1.01**0.5
    assert agreement == pytest.approx(2 * cosine / 6, abs=1e-6)
    assert modal(rows[:1])[1] == 1.0


def test_digits_need_two_numbers_each():
    assert residue_problem(range(1, 201)) is None
    assert "there are 0 with 0 and 9 numbers" in residue_problem(range(1, 10))
    # Two forms of one number are one number.
    assert "there are 1 with 0" in residue_problem([*range(1, 20), *range(1, 20)])


# Planted digits: card section 10, check 3


@pytest.fixture(scope="module")
def trained():
    x = planted(INDEX)
    span = Span.of(x)
    coordinates = span.coordinates(x)
    saes = [
        train_sae(coordinates, SaeSettings(64, 0.03, 600), torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    return span, coordinates, saes


def test_the_autoencoder_finds_the_planted_digits(trained):
    span, _, saes = trained
    for sae in saes:
        found = span.directions(residue_features(sae, RESIDUE).rows)
        cosine = torch.nn.functional.cosine_similarity(found, DIGITS, dim=1)
        assert cosine.min() > 0.9
        torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(64))
        assert (sae.active >= 0).all()


def test_training_repeats_itself_bit_by_bit(trained):
    _, coordinates, _ = trained
    settings = SaeSettings(16, 0.1, 20)
    one, two = (
        train_sae(coordinates, settings, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.decoder, two.decoder)
    other = train_sae(coordinates, settings, torch.Generator().manual_seed(6))
    assert not torch.equal(one.decoder, other.decoder)


def test_the_probe_finds_the_planted_digits_and_carries_over(trained):
    span, coordinates, _ = trained
    probe = fit_probe(coordinates, RESIDUE)
    assert mean_cosine(span.directions(probe.weight), DIGITS) > 0.9
    assert probe.accuracy(coordinates, RESIDUE) == 1.0
    assert held_out_accuracy(coordinates, INDEX) == 1.0
    words = torch.arange(1, 21)
    assert probe.accuracy(span.coordinates(planted(words, domain=1)), words % 10) == 1.0


def test_random_representations_have_no_digits():
    x = torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(3))
    span = Span.of(x)
    coordinates = span.coordinates(x)
    assert held_out_accuracy(coordinates, INDEX) < 0.25
    probe = fit_probe(coordinates, RESIDUE)
    sae = train_sae(coordinates, SaeSettings(64, 0.1, 200), torch.Generator().manual_seed(0))
    rows = residue_features(sae, RESIDUE).rows
    assert abs(mean_cosine(rows, probe.weight)) < 0.6
    assert coverage(sae.active, RESIDUE) < 0.35


def test_too_few_tens_to_hold_any_out():
    assert held_out_accuracy(torch.randn(10, 4), torch.arange(10)) is None


# Steering


def test_steering_moves_the_digit_at_its_own_strength():
    x = planted(torch.tensor([35]))
    steered = steer(x, DIGITS, torch.tensor([5]), 1.0)
    torch.testing.assert_close(steered[0, 7], planted(torch.tensor([37]))[0])
    torch.testing.assert_close(steered[0, 5], x[0])
    twice = steer(x, 3.0 * DIGITS, torch.tensor([5]), 2.0)
    expected = x[0] - 2 * DIGITS[5] + 2 * DIGITS[7]
    torch.testing.assert_close(twice[0, 7], expected, rtol=1e-4, atol=1e-5)


def test_steering_targets_worked_by_hand():
    # Pairs 1->2 ... 12->1: the target of index i stands at i - 1.
    targets = steering_targets(all_of(MONTHS))
    assert targets[0].tolist() == [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    # November is in the tens: digit 2 leads to December's successor, digit 5 only to May's.
    assert targets[10].tolist() == [9, 10, 11, 2, 3, 4, 5, 6, 7, 8]
    days = Series("days", tuple("abcdefg"), cyclic=True)
    assert steering_targets(all_of(days))[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, -1, -1]
    # The last number has no successor, so nothing is steered to it.
    short = Series("short", tuple("abcdefghijk"))
    assert steering_targets(all_of(short))[0, 1] == 0
    assert steering_targets(TokenSet(short, "space", (1, 2, 11), (0, 1, 2)))[2, 1] == 0


@pytest.mark.parametrize("learned", [False, True])
def test_35_without_5_with_7_becomes_38(trained, learned):
    span, _, saes = trained
    directions = DIGITS
    if learned:
        directions = span.directions(residue_features(saes[0], RESIDUE).rows)
    numbers, x = all_of(NUMBERS), planted(INDEX)
    found = steer_set(numbers, steer(x, directions, RESIDUE, 1.0), turning_head(), x.T)
    assert found.said[34, 7] == 38
    assert found.hit[34, 7] == 1.0
    assert found.said[34, 5] == 36
    # Digit 9 would need a carry: 35 -> 39 -> 40 is not what the head says.
    assert (found.hit[:99, 9] == 0).all()
    others = [digit for digit in range(9) if digit != 0]
    assert found.hit[:99, others].mean() > (0.95 if learned else 0.999)


def test_success_leaves_out_what_was_not_steered():
    hit = torch.full((2, 10), torch.nan)
    hit[0, :3] = torch.tensor([1.0, 1.0, 0.0])
    found = Steered(hit, torch.zeros(2, 10, dtype=torch.long))
    assert found.success(torch.tensor([0, 0])).item() == 0.5
    assert found.success(torch.tensor([2, 0])).item() == 1.0
    assert Steered(hit[1:], found.said[1:]).success(torch.tensor([0])).isnan()


def test_a_digits_direction_raises_the_numbers_with_the_next_digit():
    logits = digit_logits(DIGITS, turning_head(), planted(INDEX).T, INDEX)
    assert names_next_digit(logits).all()
    assert logits.argmax(dim=1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(10), atol=1e-5, rtol=0)
    copying = (torch.eye(D_MODEL), torch.eye(D_MODEL))
    assert not names_next_digit(digit_logits(DIGITS, copying, planted(INDEX).T, INDEX)).any()


# Factoring


def domains(reps_of):
    words = Series("words", tuple(f"w{i}" for i in range(20)))
    letters = Series("letters", tuple("abcdefghijklmnopqrstuvwxyz"))
    sets = [all_of(one) for one in (words, MONTHS, letters)]
    reps = [reps_of(torch.tensor(one.index), domain) for domain, one in enumerate(sets)]
    return reps, sets


def test_combinations_worked_by_hand():
    a, b = Series("a", ("x", "y")), Series("b", ("x", "y"))
    cells = make_cells([torch.eye(2), torch.eye(2)], [all_of(a), all_of(b)])
    found = torch.stack(combinations(cells, cells), dim=1).tolist()
    # Cells: 0 = a1, 1 = a2, 2 = b1, 3 = b2. Index of a1 with domain of b2 is b1, and so on.
    assert found == [[0, 3, 2], [1, 2, 3], [2, 1, 0], [3, 0, 1]]


def test_an_index_of_one_domain_alone_is_no_cell():
    short, long = Series("a", ("x", "y")), Series("b", ("x", "y", "z"))
    cells = make_cells([torch.eye(3)[:2], torch.eye(3)], [all_of(short), all_of(long)])
    assert cells.index.tolist() == [1, 2, 1, 2]
    assert cells.domain.tolist() == [0, 0, 1, 1]


def test_ridge_regression_finds_a_projection():
    keep = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    difference = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = fit_index_map(difference, difference @ keep)
    torch.testing.assert_close(found, keep, atol=5e-3, rtol=0)


def test_planted_index_and_domain_are_factored_also_for_an_unseen_domain():
    reps, sets = domains(planted)
    roman = all_of(Series("Roman", tuple(f"r{i}" for i in range(10))))
    unseen = planted(torch.tensor(roman.index), 0) + 3 * orthonormal(1, seed=9)
    found = factoring_accuracy(reps, sets, torch.Generator().manual_seed(0), (unseen, roman))
    assert found == (1.0, 1.0)


def test_random_representations_are_not_factored():
    def random(index, domain):
        generator = torch.Generator().manual_seed(domain)
        return torch.randn(len(index), D_MODEL, generator=generator)

    known, strange = factoring_accuracy(*domains(random), torch.Generator().manual_seed(0))
    assert known < 0.2
    assert strange is None


def test_one_domain_cannot_be_factored():
    reps, sets = domains(planted)
    generator = torch.Generator()
    assert factoring_accuracy(reps[:1], sets[:1], generator) == (None, None)
