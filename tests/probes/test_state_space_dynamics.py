"""The simulator against closed forms, a naive triple sum and a fixed-step integrator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.state_space_dynamics import (
    BLOW_UP,
    Systems,
    blow_up_time,
    convergent_limits,
    log_times,
    one_dimensional,
    predicted_regime,
    simulate,
    simulated_regime,
    slow_first_token,
    velocity,
)
from workbench.errors import DataError


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def tokens(*values):
    return row(*values)[None, :, None]


def single(mu, s, a=0.7):
    return one_dimensional(row(mu), row(s), row(a))


# The right-hand side


def naive_velocity(m, s_delta, a, x):
    """The equation of the card, term by term."""
    n_tokens, dim = x.shape
    delta = [
        [math.log1p(math.exp(float(s_delta[d] @ x[j]))) for d in range(dim)]
        for j in range(n_tokens)
    ]
    out = torch.zeros_like(x)
    for token in range(n_tokens):
        for d in range(dim):
            for j in range(token + 1):
                passed = sum(delta[k][d] for k in range(j + 1, token + 1))
                weight = float(x[token] @ m @ x[j])
                out[token, d] += weight * math.exp(-float(a[d]) * passed) * delta[j][d] * x[j, d]
    return out


@given(n_tokens=st.integers(1, 5), dim=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_recurrence_equals_the_triple_sum(n_tokens, dim, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    systems = Systems(draw(2, dim, dim), draw(2, dim, dim), draw(2, dim).exp())
    x = draw(2, n_tokens, dim)
    expected = torch.stack(
        [naive_velocity(systems.m[i], systems.s_delta[i], systems.decay[i], x[i]) for i in range(2)]
    )
    torch.testing.assert_close(velocity(systems, x), expected)


def test_one_token_by_hand():
    # x' = mu x^3 ln(1 + e^{s x}) at x = 2, s = 0: 8 mu ln 2.
    found = velocity(single(-0.5, 0.0), tokens(2.0))
    assert found.item() == pytest.approx(-4 * math.log(2))


def test_zero_tokens_stay_and_see_nothing():
    found = velocity(single(1.0, 0.5), tokens(1.0, 0.0, 2.0))
    assert found[0, 1, 0] == 0.0
    assert found[0, 2, 0] > found[0, 0, 0]


def test_later_tokens_do_not_move_earlier_ones():
    systems = single(-1.3, 0.8)
    short, long = velocity(systems, tokens(1.0, -0.6)), velocity(systems, tokens(1.0, -0.6, 9.0))
    torch.testing.assert_close(long[:, :2], short)


# The integrator


def test_it_agrees_with_small_fixed_steps():
    systems, x = single(0.4, -0.6), tokens(0.9, -0.7, 0.5)
    found = simulate(systems, x, row(0, 0.5)).x[0, -1]
    h = 1e-3
    for _ in range(500):  # classical Runge-Kutta in t itself
        k1 = velocity(systems, x)
        k2 = velocity(systems, x + h / 2 * k1)
        k3 = velocity(systems, x + h / 2 * k2)
        k4 = velocity(systems, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(found, x[0], rtol=1e-6, atol=1e-8)


def test_a_system_is_the_same_alone_and_among_others():
    mu, s, a = row(-1.0, 0.5, 2.0), row(0.3, -1.0, 0.5), row(0.7, 0.2, 1.0)
    start = torch.randn(3, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time = log_times(100.0, 5)
    together = simulate(one_dimensional(mu, s, a), start, time, tolerance=1e-5)
    for i in range(3):
        one = slice(i, i + 1)
        alone = simulate(one_dimensional(mu[one], s[one], a[one]), start[one], time, tolerance=1e-5)
        torch.testing.assert_close(alone.x[0], together.x[i], equal_nan=True, rtol=1e-9, atol=0)
        torch.testing.assert_close(alone.stop_time[0], together.stop_time[i])


def test_what_is_recorded_does_not_change_the_path():
    few, many = (simulate(single(1.0, -1.0), tokens(1.0, 1.0), log_times(1e3, n)) for n in (2, 40))
    torch.testing.assert_close(few.x[:, -1], many.x[:, -1], rtol=1e-5, atol=0)
    assert many.time[0] == 0
    assert many.time[-1].item() == pytest.approx(1e3)


def test_signs_are_kept():
    found = simulate(single(-1.3, 0.8), tokens(1.0, -0.6, 0.8, -0.3), log_times(1e5, 5))
    assert (torch.sign(found.x[0, :, :, 0]) == torch.sign(row(1, -1, 1, -1))).all()


# Closed-form limits (card sections 3 and 7.1)


@pytest.mark.parametrize("mu", [-1.3, -0.4])
def test_convergent_tokens_fall_like_one_over_the_root_of_t(mu):
    found = simulate(single(mu, 0.8), tokens(1.0, -0.6, 0.8, 0.3), row(0, 1e7)).x[0, -1, :, 0]
    first, later = convergent_limits(mu, 0.7)
    scaled = math.sqrt(1e7) * found.abs()
    assert scaled[0].item() == pytest.approx(first, rel=0.01)
    assert scaled[1:].tolist() == pytest.approx([later] * 3, rel=0.01)


def test_the_numbers_of_the_card():
    # Another program's run: mu = -1.3, s = 0.8, a = 0.7, t = 1e7.
    found = simulate(single(-1.3, 0.8), tokens(1.0, -0.6, 0.8, 0.3), row(0, 1e7)).x[0, -1, :, 0]
    scaled = (math.sqrt(1e7) * found.abs()).tolist()
    assert scaled == pytest.approx([0.74480, 0.46240, 0.46131, 0.45988], abs=1e-4)
    assert convergent_limits(-1.3, 0.7) == pytest.approx((0.74490, 0.46186), abs=1e-5)


@pytest.mark.parametrize("s", [-1.0, -2.0])
def test_slow_divergence_follows_the_logarithm(s):
    time = row(0, 1e3, 1e5, 1e7)
    found = simulate(single(1.0, s), tokens(1.0, 1.0, 1.0), time).x[0, :, :, 0]
    predicted = [slow_first_token(1.0, s, t) for t in (1e3, 1e5, 1e7)]
    errors = [abs(x / y - 1) for x, y in zip(found[1:, 0].tolist(), predicted, strict=True)]
    assert errors[-1] < 0.01
    assert errors == sorted(errors, reverse=True)  # o(1)
    assert (found[-1].diff() > 0).all()  # later tokens grow faster
    if s == -1.0:
        assert found[1:, 0].tolist() == pytest.approx([14.71, 20.39, 25.73], abs=0.01)
        assert predicted == pytest.approx([15.04, 20.59, 25.88], abs=0.01)


@pytest.mark.parametrize(
    ("mu", "s", "x0"),
    [
        pytest.param(1.0, 1.0, 0.7, marks=pytest.mark.slow),
        (0.5, 2.0, 1.2),
        (2.0, -0.5, -0.9),
    ],
)
def test_fast_divergence_ends_in_finite_time(mu, s, x0):
    found = simulate(single(mu, s), tokens(x0), row(0, 100.0), tolerance=1e-7)
    assert found.stop_time.item() == pytest.approx(blow_up_time(mu, s, x0), rel=1e-4)
    assert found.x[0, -1].isnan().all()
    assert found.stop_rate.item() > 1e12


def test_the_blow_up_time_of_the_card():
    assert blow_up_time(1.0, 1.0, 0.7) == pytest.approx(0.72203, abs=1e-5)


def test_the_blow_up_integral_by_the_trapezoidal_rule():
    x = torch.logspace(math.log10(0.7), 6, 400_001, dtype=torch.float64)
    y = 1 / (x**3 * torch.nn.functional.softplus(x))
    assert blow_up_time(1.0, 1.0, 0.7) == pytest.approx(torch.trapezoid(y, x).item(), rel=1e-6)


def test_without_mu_nothing_moves():
    found = simulate(single(0.0, 0.8), tokens(1.0, -0.6), log_times(1e6, 4))
    assert torch.equal(found.x[0, -1], found.x[0, 0])
    assert simulated_regime(found, 0) == predicted_regime(0.0, 0.8, row(1, -0.6)) == "constant"


# Regimes


def test_200_random_systems_are_classified_without_error():
    generator = torch.Generator().manual_seed(7)

    def away_from_zero(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.sign(drawn) * (drawn.abs() + 0.1)

    mu, s = away_from_zero(200), away_from_zero(200)
    a = torch.rand(200, generator=generator, dtype=torch.float64) + 0.3
    start = away_from_zero(200, 3)
    # Half of them with tokens of one sign, else slow divergence would be rare.
    start[::2] = start[::2].abs() * torch.sign(start[::2, :1])
    found = simulate(one_dimensional(mu, s, a), start[..., None], row(0, 1e3, 1e7), tolerance=1e-5)
    expected = [predicted_regime(float(mu[i]), float(s[i]), start[i]) for i in range(200)]
    assert [simulated_regime(found, i) for i in range(200)] == expected
    for regime in ("convergent", "slow divergent", "fast divergent"):
        assert expected.count(regime) >= 20


def test_slow_divergence_may_pass_the_stop_and_stays_slow():
    # |s| is small: tokens grow far before Delta vanishes.
    start = tokens(0.5123, 0.9296, 0.6073, 1.0478)
    found = simulate(single(0.4994, -0.0432, 0.7515), start, row(0, 1e7), tolerance=1e-6)
    assert torch.isfinite(found.stop_time[0])
    assert simulated_regime(found, 0) == "slow divergent"


@pytest.mark.parametrize(
    ("m", "grows"), [((-1.0, -2.0), False), ((1.0, -1.0), True), ((1.0, 2.0), True)]
)
def test_two_dimensions_follow_the_signs(m, grows):
    # Card section 7.5; the tokens have a part along every axis.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 3, 2, generator=generator, dtype=torch.float64)
    systems = Systems(torch.diag(row(*m))[None], torch.eye(2).double()[None], row(0.5, 0.9)[None])
    found = simulate(systems, start, row(0, 1e4), tolerance=1e-6)
    if grows:
        assert torch.isfinite(found.stop_time[0])
        assert found.stop_time[0] < 1e4
    else:
        norms = found.x[0, :, :, :].norm(dim=-1)
        assert (norms[-1] < 0.05 * norms[0]).all()
        assert not torch.isfinite(found.stop_time[0])


def test_it_stops_at_the_bound():
    found = simulate(single(1.0, 1.0), tokens(1.0, 1.0), log_times(1e3, 9), tolerance=1e-6)
    seen = found.x[torch.isfinite(found.x)]
    assert seen.abs().max() < BLOW_UP
    after = found.time > found.stop_time[0]
    assert found.x[0, after].isnan().all()
    assert torch.isfinite(found.x[0, ~after]).all()


def test_a_decay_that_does_not_fade_is_refused():
    with pytest.raises(DataError, match="decay must be above 0"):
        single(1.0, 1.0, a=0.0)
