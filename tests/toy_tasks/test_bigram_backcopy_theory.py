"""The simplified model's flow against its closed forms, and against other integrators."""

import math

import pytest
import torch

from toy_tasks.bigram_backcopy_theory import (
    SimplifiedModel,
    State,
    _slope_and_fisher,
    grow_residual,
    growing_logit,
    integrate,
    log_times,
    residual_of_flow,
    stationary_value,
)

SEEDS = (0, 1, 2)


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def example(seed=0, n=12):
    """A random law over n tokens, all of which are also what may follow."""
    x = draw(seed, n + 2, n)
    return SimplifiedModel((0.5 * x[0]).softmax(dim=-1), x[1:-1].softmax(dim=-1), x[-1])


def even(alpha, beta):
    return State(torch.full_like(beta, alpha), beta)


def slope_in(x, y):
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def gradient(model, y):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(model.loss(y[:12], y[12:]), y)[0]


def runge_kutta(flow, y, end, n_steps):
    """Classical fourth order, with equal steps and autograd's gradient: nothing of ours in it."""
    step = end / n_steps
    for _ in range(n_steps):
        first = flow(y)
        second = flow(y + step / 2 * first)
        third = flow(y + step / 2 * second)
        fourth = flow(y + step * third)
        y = y + step / 6 * (first + 2 * second + 2 * third + fourth)
    return y


def test_variance_and_loss_by_hand():
    law = torch.tensor([[0.5, 0.25, 0.25]]).double()
    model = SimplifiedModel(torch.ones(1).double(), law, torch.tensor([2.0, 0.0, 4.0]).double())
    assert model.variance().tolist() == [5.0 + 1.0 - 4.0]
    # Half of the attention on a value of 0 leaves z / 2 = 1, 0, 2 to do harm.
    weights = [0.5 * math.e, 0.25, 0.25 * math.e**2]
    divergence = math.log(sum(weights)) - (0.5 * 1 + 0.25 * 2)
    zero = torch.zeros(3).double()
    assert model.loss(torch.zeros(1).double(), zero).item() == pytest.approx(divergence)
    assert model.loss(torch.zeros(1).double(), -model.context).item() == pytest.approx(0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_slope_and_curvature_are_those_of_the_loss(seed):
    model, alpha, beta = example(seed), draw(seed + 10, 12), draw(seed + 20, 12)
    slope, _ = _slope_and_fisher(model, alpha, beta)
    torch.testing.assert_close(slope, gradient(model, torch.cat([alpha, beta])))
    # Where the loss is 0 the Fisher information is the Hessian.
    rest = torch.cat([torch.full((12,), 0.75).double(), stationary_value(model, 0.75, 0.2)])
    _, fisher = _slope_and_fisher(model, rest[:12], rest[12:])
    hessian = torch.autograd.functional.hessian(lambda y: model.loss(y[:12], y[12:]), rest)
    torch.testing.assert_close(fisher, hessian, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("hold", ["alpha", "beta", "neither"])
def test_the_integrator_agrees_with_another_one(hold):
    model, start = example(4), State(0.5 * draw(5, 12), draw(6, 12))
    moves = torch.ones(24)
    if hold != "neither":
        moves[:12] = hold != "alpha"
        moves[12:] = hold != "beta"

    def flow(y):
        return -moves * gradient(model, y)

    other = runge_kutta(flow, torch.cat([start.alpha, start.beta]), 60.0, n_steps=60)
    found = integrate(model, start, log_times(1e-3, 60.0, 500), hold=hold)
    ours = torch.cat([found.alpha[-1], found.beta[-1]])
    torch.testing.assert_close(ours, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_the_value_held_every_sink_logit_grows_like_half_the_logarithm_of_time(seed):
    model, times = example(seed), log_times(1e-2, 1e8, 1000)
    flow = integrate(model, even(0.0, torch.full((12,), 0.25).double()), times, hold="beta")
    late = times > 1e6
    for token in range(12):
        assert slope_in(times[late].log(), flow.alpha[late, token]) == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(
        flow.alpha[-1], growing_logit(model, times[-1:])[0], atol=0.01, rtol=0
    )
    assert torch.all(flow.beta == 0.25)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_with_the_logits_held_the_value_goes_to_its_stationary_form_and_keeps_its_mean(seed, alpha):
    model, start = example(seed), even(alpha, draw(seed + 30, 12))
    flow = integrate(model, start, log_times(1e-2, 1e4, 400), hold="alpha")
    mean = start.beta.mean()
    assert (flow.beta.mean(dim=1) - mean).abs().max() < 1e-12
    wanted = stationary_value(model, alpha, mean.item())
    torch.testing.assert_close(flow.beta[-1], wanted, atol=1e-10, rtol=0)
    assert (flow.beta[0] - wanted).abs().max() > 0.1
    assert torch.all(flow.alpha == alpha)


def test_the_value_comes_to_rest_exponentially():
    model, start = example(1), even(0.5, draw(2, 12))
    wanted = stationary_value(model, 0.5, start.beta.mean().item())
    times = torch.linspace(0, 900, 1801, dtype=torch.float64)
    left = (integrate(model, start, times, hold="alpha").beta - wanted).norm(dim=1)
    _, fisher = _slope_and_fisher(model, start.alpha, wanted)
    rates = torch.linalg.eigvalsh(fisher[12:, 12:])  # the first is 0: the mean does not move
    assert slope_in(times[1200:], left[1200:].log()) == pytest.approx(-rates[1].item(), rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_joint_flow_rests_at_equal_logits_and_a_drained_value(seed):
    model, start = example(seed), State(0.5 * draw(seed + 40, 12), torch.zeros(12).double())
    flow = integrate(model, start, log_times(1e-2, 1e6, 1000))
    alpha = flow.alpha[-1]
    assert start.alpha.std() > 0.3
    assert alpha.max() - alpha.min() < 1e-8
    wanted = stationary_value(model, alpha.mean().item(), 0.0)
    torch.testing.assert_close(flow.beta[-1], wanted, atol=1e-8, rtol=0)
    length = math.exp(-alpha.mean()) * (model.context - model.context.mean()).norm()
    assert flow.beta[-1].norm().item() == pytest.approx(length.item(), rel=1e-8)
    assert alpha.mean() < 3.0  # it stops: no growth with the logarithm of time


def test_sgd_follows_the_flow_of_the_residual_and_flattens():
    times = torch.arange(1, 4002, dtype=torch.float64)
    found = grow_residual("sgd", 4000, lr=0.02)
    torch.testing.assert_close(found, residual_of_flow(times, 0.02), atol=3e-3, rtol=0)
    assert found[-1] > 1.3
    # m^4 goes like ln^2 t: every ten times as many updates add less per update, and in the end less.
    assert (found[4000] - found[2000]) < 0.3 * (found[200] - found[0])


def test_adam_goes_on_by_its_learning_rate_where_sgd_flattens():
    adam, sgd = (grow_residual(name, 4000, lr=2e-3) for name in ("adam", "sgd"))
    assert 0.85 * 2e-3 < (adam[-1] - adam[2000]) / 2000 < 2.001e-3
    assert adam[-1] - 1 > 15 * (sgd[-1] - 1)


def test_times_begin_at_0_and_are_even_in_the_logarithm():
    times = log_times(0.1, 1000.0, 5)
    assert times.tolist() == pytest.approx([0.0, 0.1, 1.0, 10.0, 100.0, 1000.0])
