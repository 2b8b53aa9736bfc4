"""The refinements on transformers' own Mamba, and their mathematics by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.selective import (
    PrescribedSigns,
    ReorderedMixer,
    exclude_regime,
    reorder_by_importance,
    selective_scan,
    soft_sort,
)

EXPECTED = {"positive": "divergent", "negative": "convergent", "mixed": "mixed"}


# Signs


def test_the_parametrisation_by_hand():
    raw = torch.arange(24.0).view(6, 4)  # rank 2, d_state 2
    out = PrescribedSigns(2, "negative")(raw)
    triangle = torch.tensor([[1.0, 9, 10, 11], [0, 1, 14, 15]])
    lam = -torch.nn.functional.softplus(torch.tensor([16.0, 20.0])) - 0.7
    torch.testing.assert_close(out[:2], raw[:2])
    torch.testing.assert_close(out[2:4], lam[:, None] * triangle)
    torch.testing.assert_close(out[4:], triangle)


@given(n=st.integers(1, 6), extra=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_m_is_symmetric_with_the_prescribed_inertia(n, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(3 + 2 * n, n + extra, generator=generator, dtype=torch.float64)
    for sign, n_positive in (("positive", n), ("negative", 0), ("mixed", n // 2)):
        out = PrescribedSigns(n, sign)(raw)
        m = out[3 + n :].T @ out[3 : 3 + n]
        torch.testing.assert_close(m, m.T)
        values = torch.linalg.eigvals(out[3 : 3 + n] @ out[3 + n :].T).real
        assert int((values > 0).sum()) == n_positive
        assert int((values < 0).sum()) == n - n_positive


@pytest.mark.parametrize("sign", EXPECTED)
def test_a_refined_mamba_is_in_the_chosen_regime_and_stays_there(sign):
    model = tiny_model("mamba")
    exclude_regime(model, sign)
    tokens = random_tokens(2, 8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        model.train()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    original = model.backbone.layers[0].mixer.x_proj.parametrizations.weight.original
    assert original.grad.abs().max() > 0
    result = wb.run("token-dynamics", wb.wrap(model), mode="state-space")
    assert result.labels["regime"] == [EXPECTED[sign]] * 2
    # Taken off, the weights stay.
    before = model(tokens, use_cache=False).logits.detach()
    for block in model.backbone.layers:
        parametrize.remove_parametrizations(block.mixer.x_proj, "weight")
    torch.testing.assert_close(model(tokens, use_cache=False).logits.detach(), before)


# Order


@given(seed=st.integers(0, 99), n=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_soft_sort_becomes_the_permutation(seed, n):
    scores = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    soft = soft_sort(scores)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, n))
    order = scores.argsort(dim=-1, descending=True)
    permutation = torch.nn.functional.one_hot(order, n).float()
    torch.testing.assert_close(soft_sort(scores, 1e-6), permutation, rtol=0, atol=1e-2)
    torch.testing.assert_close(soft_sort(scores, hard=True), permutation)
    sorted_scores = (soft_sort(scores, hard=True) @ scores[..., None])[..., 0]
    torch.testing.assert_close(sorted_scores, scores.sort(dim=-1, descending=True).values)


def test_soft_sort_by_hand():
    found = soft_sort(torch.tensor([[0.0, 1.0]]))[0]
    e = torch.exp(torch.tensor(-1.0)).item()
    expected = torch.tensor([[e, 1], [1, e]]) / (1 + e)
    torch.testing.assert_close(found, expected)


def test_hard_sorting_breaks_ties_and_keeps_the_soft_gradient():
    scores = torch.tensor([[1.0, 1.0, 2.0]], requires_grad=True)
    hard = soft_sort(scores, hard=True)
    assert hard[0].argmax(-1).tolist() == [2, 0, 1]
    weight = torch.randn(1, 3, 3)
    grad = torch.autograd.grad((hard * weight).sum(), scores)[0]
    soft = torch.autograd.grad((soft_sort(scores) * weight).sum(), scores)[0]
    torch.testing.assert_close(grad, soft)
    assert grad.abs().max() > 0


def test_the_scan_by_hand():
    ln2 = torch.log(torch.tensor(2.0)).item()
    one = torch.ones(1, 3, 1)
    # a = 1, Delta = ln 2: the state halves at each step; B = C = 1, x = 1.
    found = selective_scan(one, ln2 * one, torch.ones(1, 1), one, one)
    assert found.flatten().tolist() == pytest.approx([ln2, 1.5 * ln2, 1.75 * ln2])


def test_without_an_order_it_is_transformers_own_mixer():
    model = tiny_model("mamba")
    mixer, hidden = model.backbone.layers[0].mixer, torch.randn(2, 7, 32)
    wrapped = ReorderedMixer(mixer)
    wrapped.order = None
    torch.testing.assert_close(wrapped(hidden), mixer(hidden), rtol=1e-4, atol=1e-5)


def test_important_tokens_come_last():
    model, seen = tiny_model("mamba"), []
    reorder_by_importance(model, hard=True)
    order = model.backbone.layers[0].mixer.order
    order.score.register_forward_hook(lambda m, i, o: seen.append(o[..., 0].detach()))
    order.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    model(random_tokens(2, 9))
    scores, permutation = seen
    ranked = (permutation @ scores[..., None])[..., 0]
    assert (ranked.diff(dim=-1) >= 0).all()
    assert not torch.equal(ranked, scores)


def test_the_reordered_model_learns_its_scores():
    model, tokens = tiny_model("mamba"), random_tokens(2, 9)
    plain = tiny_model("mamba")(tokens).logits
    reorder_by_importance(model)
    assert isinstance(model.backbone.layers[0].mixer, ReorderedMixer)
    assert not isinstance(model.backbone.layers[1].mixer, ReorderedMixer)
    out = model(tokens, labels=tokens)
    assert not torch.allclose(out.logits, plain, atol=1e-3)
    out.loss.backward()
    assert model.backbone.layers[0].mixer.order.score.weight.grad.abs().max() > 0


# Refusals


def test_other_models_and_signs_are_refused():
    with pytest.raises(CapabilityError, match="use a mamba model"):
        exclude_regime(tiny_model("gpt2"))
    with pytest.raises(CapabilityError, match="use a mamba model"):
        reorder_by_importance(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="positive, negative, mixed; got up"):
        exclude_regime(tiny_model("mamba"), "up")
    with pytest.raises(ConfigError, match="below 2; got 5"):
        reorder_by_importance(tiny_model("mamba"), (5,))
    with pytest.raises(ConfigError, match="tau must be above 0"):
        soft_sort(torch.ones(1, 2), 0.0)


def test_padding_and_caches_are_refused():
    model = tiny_model("mamba")
    reorder_by_importance(model)
    tokens, mask = random_tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(CapabilityError, match="use_cache=False"):
        model(tokens, use_cache=True)
    mask[0, -1] = 0
    with pytest.raises(DataError, match="without padding"):
        model(tokens, attention_mask=mask)
