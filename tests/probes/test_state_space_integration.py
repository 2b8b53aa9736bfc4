"""How the simulator steps, stops and says what it saw: the order of its method, its bounds, its edges."""

import math

import pytest
import torch

import probes.state_space_dynamics as dynamics
from probes.state_space_dynamics import (
    BLOW_UP,
    BLOW_UP_RATE,
    Systems,
    Trajectory,
    log_times,
    one_dimensional,
    predicted_regime,
    simulate,
    simulated_regime,
    slow_first_token,
    velocity,
)
from workbench.errors import DataError, EngineError


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def single(mu, s, a=0.7):
    return one_dimensional(row(mu), row(s), row(a))


def cubic(x0, mu, t):
    """x' = mu x^3 ln 2, the first token with s = 0: solved exactly."""
    return x0 / math.sqrt(1 - 2 * mu * math.log(2) * x0**2 * t)


def test_a_cubic_system_is_solved_to_its_tolerance():
    time = row(0, 0.25, 1.0, 30.0)
    for tolerance, error in ((1e-6, 2e-5), (1e-10, 2e-9)):
        found = simulate(single(-1.5, 0.0), row(0.8)[None, :, None], time, tolerance=tolerance)
        expected = [cubic(0.8, -1.5, float(t)) for t in time]
        assert found.x[0, :, 0, 0].tolist() == pytest.approx(expected, rel=error)


def test_steps_have_the_fifth_order_and_errors_of_the_fourth():
    systems, x, u = single(-1.5, 0.0), row(0.8)[None, :, None], row(0.0)
    off, said = [], []
    for h in (0.2, 0.1):
        moved, error = dynamics._dormand_prince(systems, x, u, row(h))
        off.append(abs(float(moved) - cubic(0.8, -1.5, math.expm1(h))))
        said.append(abs(float(error)))
        assert off[-1] < said[-1] < 100 * off[-1]
    assert 5.0 < math.log2(off[0] / off[1]) < 7.0  # h^6 a step
    assert 4.0 < math.log2(said[0] / said[1]) < 6.0  # h^5


def test_a_step_in_time_that_runs_on_is_scaled_by_it():
    # In u = ln(1 + t) the slope is (1 + t) dx/dt.
    systems, x = single(-1.5, 0.0), row(cubic(0.8, -1.5, 3.0))[None, :, None]
    moved, _ = dynamics._dormand_prince(systems, x, row(math.log(4.0)), row(0.05))
    expected = cubic(0.8, -1.5, 4 * math.exp(0.05) - 1)
    assert float(moved) == pytest.approx(expected, rel=1e-8)


def counted(monkeypatch):
    """How many systems each evaluation moved."""
    calls = []

    def spy(systems, x):
        calls.append(len(x))
        return velocity(systems, x)

    monkeypatch.setattr(dynamics, "velocity", spy)
    return calls


def test_few_steps_are_enough_and_a_finer_tolerance_takes_more(monkeypatch):
    calls = counted(monkeypatch)
    sizes = []
    for tolerance in (1e-4, 1e-8):
        calls.clear()
        simulate(single(-1.0, 0.5), row(0.8, -0.5)[None, :, None], row(0, 1e4), tolerance=tolerance)
        sizes.append(len(calls) / 7)
    # The error of a step falls like h^5: 10^4 finer is 10^0.8 = 6.3 times as many.
    assert 10 < sizes[0] < 120
    assert 2.5 < sizes[1] / sizes[0] < 9


def test_a_recorded_time_does_not_shorten_the_steps_behind_it(monkeypatch):
    calls = counted(monkeypatch)
    start = row(0.8, -0.5)[None, :, None]
    simulate(single(-1.0, 0.5), start, row(0, 1e4))
    alone = len(calls)
    calls.clear()
    simulate(single(-1.0, 0.5), start, row(0, 10.0, 10.0 + 1e-6, 1e4))
    # Two more cuts: a few steps more, not a climb from 1e-6 again.
    assert len(calls) - alone <= 7 * 4


def test_systems_that_stopped_are_moved_no_more(monkeypatch):
    calls = counted(monkeypatch)
    mu, s = row(1.0, -1.0), row(1.0, 0.5)
    start = row(1.0, 0.8)[:, None, None]
    found = simulate(one_dimensional(mu, s, row(0.7, 0.7)), start, row(0, 1e3, 1e4), tolerance=1e-4)
    assert torch.isfinite(found.stop_time).tolist() == [True, False]
    assert calls[-1] == 1
    assert found.stop_rate[1] == 0.0
    assert found.x[0, 1:].isnan().all()
    assert found.x[1].isfinite().all()
    # What moved |x| beyond the bound: mu x^2 ln(1 + e^{s x}) with x above it.
    assert found.stop_rate[0] >= BLOW_UP**3


def test_too_many_steps_are_an_error(monkeypatch):
    monkeypatch.setattr(dynamics, "MAX_STEPS", 5)
    with pytest.raises(EngineError, match="within 5 steps"):
        simulate(single(-1.0, 0.5), row(0.8)[None, :, None], row(0, 1e4))
    # A system that is there at once needs none.
    simulate(single(-1.0, 0.5), row(0.8)[None, :, None], row(0, 1e-5))


def test_parts_of_systems_keep_what_is_theirs():
    systems = Systems(torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.rand(3, 2) + 0.1)
    part = systems.part(torch.tensor([2, 0]))
    for name in ("m", "s_delta", "decay"):
        assert torch.equal(getattr(part, name), getattr(systems, name)[[2, 0]])


def test_every_decay_must_be_above_0():
    with pytest.raises(DataError, match=r"got -0\.5"):
        one_dimensional(row(1, 1), row(1, 1), row(0.3, -0.5))
    one_dimensional(row(1, 1), row(1, 1), row(0.3, 1e-9))


def test_times_begin_at_0_and_grow_evenly_in_their_logarithm():
    time = log_times(99.0, 3)
    assert time.tolist() == pytest.approx([0.0, 9.0, 99.0])
    assert len(log_times(1.0)) == 61


def test_the_slow_token_solves_its_equation():
    for mu, s, t in ((1.0, -1.0, 1e5), (0.3, -2.5, 1e9), (4.0, 0.7, 1e6)):
        x = slow_first_token(mu, s, t)
        assert abs(s) * x == pytest.approx(math.log(mu * abs(s) * t) + 3 * math.log(x), rel=1e-9)
        assert abs(s) * x > 3.0  # the larger of two roots


@pytest.mark.parametrize(
    ("mu", "s", "start", "expected"),
    [
        (0.0, 1.0, (1.0,), "constant"),
        (1.0, 1.0, (0.0, 0.0), "constant"),
        (-1.0, 1.0, (1.0,), "convergent"),
        (1.0, 1.0, (-1.0, -2.0), "slow divergent"),
        (1.0, 1.0, (-1.0, 2.0), "fast divergent"),
        (1.0, -1.0, (1.0, 0.0), "slow divergent"),
        (1.0, -1.0, (1.0, -0.5), "fast divergent"),
        (1.0, 0.0, (1.0,), "slow divergent"),
    ],
)
def test_predicted_regimes(mu, s, start, expected):
    assert predicted_regime(mu, s, row(*start)) == expected


@pytest.mark.parametrize(
    ("first", "last", "stopped", "rate", "expected"),
    [
        (1.0, 1.0, False, 0.0, "constant"),
        (1.0, 1.0 + 1e-8, False, 0.0, "slow divergent"),
        (1.0, 1.0 - 1e-8, False, 0.0, "convergent"),
        (1.0, 1.0 + 0.9e-9, False, 0.0, "constant"),
        (100.0, 100.0 + 9e-8, False, 0.0, "constant"),
        (0.0, 0.0, False, 0.0, "constant"),
        (1.0, math.nan, True, BLOW_UP_RATE, "slow divergent"),
        (1.0, math.nan, True, 1.01 * BLOW_UP_RATE, "fast divergent"),
        (1.0, math.nan, True, math.inf, "fast divergent"),
    ],
)
def test_simulated_regimes(first, last, stopped, rate, expected):
    x = row(5.0, 5.0, first, last).view(2, 2, 1, 1)
    time = row(math.inf, 3.0 if stopped else math.inf)
    seen = Trajectory(row(0, 1), x, time, row(0.0, rate))
    assert simulated_regime(seen, 1) == expected
    assert simulated_regime(seen, 0) == "constant"
