"""The theory's flow against its closed forms, and its invariant against exact gradient flow."""

import math

import pytest
import torch

from toy_tasks.scan_snap_data import Batch, ScanSnapConfig, class_law
from toy_tasks.scan_snap_dynamics import ascent, first_weights, forward
from toy_tasks.scan_snap_theory import (
    FlowSettings,
    distinct_invariant,
    distinct_logits,
    dominant_invariant,
    integrate_common_logit,
)


@pytest.mark.parametrize(("rate_z", "c0"), [(0.5, 1.0), (2.0, 0.1), (0.1, 7.0)])
def test_the_integrator_obeys_the_exact_identity(rate_z, c0):
    times = torch.linspace(0, 20, 4001, dtype=torch.float64)
    z = integrate_common_logit(lambda t: t * math.exp(-t), times, rate_z, c0)
    integral = 1 - (1 + times) * torch.exp(-times)  # of t e^-t
    torch.testing.assert_close(
        -z, 0.25 * torch.log1p(4 * rate_z / c0 * integral), atol=1e-8, rtol=0
    )


def test_the_flow_of_the_papers_figure_ends_on_its_closed_form():
    flow = FlowSettings(rate_y=2.0)
    ends = torch.logspace(math.log10(flow.transition), 4, 800, dtype=torch.float64)[1:]
    start = torch.linspace(0, flow.transition, 800, dtype=torch.float64)
    times = torch.cat([start, ends])
    z = integrate_common_logit(flow.gamma, times, flow.rate_z, flow.c0)
    expected = torch.tensor([flow.suppression(t) for t in times.tolist()], dtype=torch.float64)
    torch.testing.assert_close(-z, expected, atol=1e-6, rtol=0)


def test_branches_are_those_of_the_paper():
    flow = FlowSettings(n_classes=10, n_tokens=1000, rate_y=2.0, rate_z=0.5, c0=0.3)
    assert flow.transition == pytest.approx(10 * math.log(1000))
    early = 2 * 999**2 / (10 * 1000**2) * 2.0 * 0.5 * 30.0**2
    assert flow.suppression(30.0) == pytest.approx(0.25 * math.log((0.3 + early) / 0.3))

    def late(t):
        """What stands beside C0 in the paper's logarithm."""
        return 2 * 10 * 999**2 / 1000**2 * 0.5 / 2.0 * math.log(1000 * 2.0 * t / 10) ** 2

    grown = [0.3 * math.exp(4 * flow.suppression(t)) for t in (500.0, 3000.0)]
    assert grown[1] - grown[0] == pytest.approx(late(3000.0) - late(500.0))


def test_a_faster_decoder_snaps_earlier_and_less_sparse_and_faster_both_snap_sparser():
    flows = [FlowSettings(rate_y=rate) for rate in (0.5, 1.0, 2.0, 5.0)]
    transitions = [flow.transition for flow in flows]
    assert transitions == sorted(transitions, reverse=True)
    ends = [flow.suppression(1e5) for flow in flows]
    assert ends == sorted(ends, reverse=True)
    both = [FlowSettings(rate_y=2 * rate, rate_z=rate).suppression(1e5) for rate in (0.5, 1.0, 2.0)]
    # Scaling both leaves their ratio, and with it the late branch, almost as it is.
    assert both == sorted(both)


def test_invariant_by_hand():
    z, prob = torch.tensor([0.0, 0.5 * math.log(2.0)]), torch.tensor([0.1, 0.5])
    assert distinct_invariant(z, prob).tolist() == pytest.approx([0.0, 0.5 / 0.25])
    assert dominant_invariant(z, prob) == pytest.approx(2.0)
    assert distinct_logits(2.0, prob).tolist() == pytest.approx(
        [-0.5 * math.log(0.98), 0.5 * math.log(2.0)]
    )


@pytest.fixture(scope="module")
def exact_flow():
    """Small steps without noise: each class's infinitely long sequence, decoder 100 times faster."""
    config = ScanSnapConfig(n_common=1)
    law = class_law(config)
    batch = Batch(law.prob[None], law.query[None], law.next_token[None])
    weights = first_weights(config, 0, torch.float64)
    for _ in range(4000):
        Y, Z = ascent(weights, batch, forward(weights, batch))
        weights.Y.add_(1.0 * Y)
        weights.Z.add_(0.01 * Z)
    return law, weights.Z[0]


def test_speeds_in_proportion_to_squared_weight_keep_the_invariant():
    prob = class_law(ScanSnapConfig()).prob[0, 10:20]
    z = torch.zeros(10, dtype=torch.float64)
    for step in range(20_000):
        f = prob * z.exp()
        z = z + 1e-3 / (1 + 1e-4 * step) * f.square() / f.square().sum()
    kappa = distinct_invariant(z, prob)
    assert z.max() > 1
    torch.testing.assert_close(kappa, kappa.mean().expand(10), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        distinct_logits(dominant_invariant(z, prob), prob), z, rtol=2e-3, atol=0
    )


def test_gradient_flow_of_the_model_keeps_it_while_the_decoder_is_much_faster(exact_flow):
    law, Z = exact_flow
    for row in range(2):
        own = law.is_distinct[row]
        kappa = distinct_invariant(Z[row, own], law.prob[row, own])
        torch.testing.assert_close(kappa, kappa.mean().expand(10), rtol=0.03, atol=0)


def test_one_common_token_shrinks_and_all_distinct_ones_grow(exact_flow):
    law, Z = exact_flow
    for row in range(2):
        assert (Z[row, law.is_distinct[row]] > 0).all()
        assert Z[row, 0] < -0.01


def test_ratio_of_two_tokens_grows_by_the_growth_factor_of_the_first():
    law = class_law(ScanSnapConfig())
    prob = law.prob[0, law.is_distinct[0]]
    z = distinct_logits(0.9 / prob.max().item() ** 2, prob)
    f = prob * z.exp()  # up to the factor that all share
    left = (f[:, None] / f[None]).square() - 1
    chi = (2 * z).exp()
    right = ((prob[:, None] / prob[None]).square() - 1) * chi[:, None]
    torch.testing.assert_close(left, right)
