"""Going on after a prefix gives what the whole pass gives, logits and gradients."""

import pytest
import torch

import workbench as wb
from tests.zoo import ATTENTION_FAMILIES, padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.errors import CapabilityError, DataError
from workbench.interventions.zero_heads import ZeroHeads
from workbench.models.base import Site
from workbench.models.prefix import continue_after, prefix_of
from workbench.models.toy import ToyAdapter

N_POS = 12


def resid_pre(model, layer, tokens):
    site = Site("resid_pre", layer)
    return model.capture(tokens, [site])[site]


def with_gradient(forward, resid):
    resid = resid.clone().requires_grad_()
    logits = forward(resid)
    weights = torch.linspace(-1.0, 1.0, logits[0, 0].numel())
    (logits.log_softmax(-1) * weights).mean().backward()
    return logits.detach(), resid.grad


@pytest.mark.parametrize("n_before", [1, 4, 7])  # windows are 5 tokens long
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_pass(family, layer, n_before):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(3, N_POS)
    resid = resid_pre(model, layer, tokens)
    prefix = model.prefix(tokens[:, :n_before])
    wanted = with_gradient(lambda r: model.continue_from(layer, r, last=4), resid)
    for _ in range(2):  # a pass leaves the prefix as it was
        found = with_gradient(
            lambda r: model.continue_from(layer, r, last=4, prefix=prefix), resid[:, n_before:]
        )
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], wanted[1][:, n_before:], rtol=1e-5, atol=1e-5)
    assert wanted[1][:, n_before:].abs().max() > 1e-4


def test_rows_may_come_in_any_order_and_more_than_once():
    model, tokens = wb.wrap(tiny_model("gemma2")), random_tokens(3, N_POS)
    resid, whole = resid_pre(model, 1, tokens), model.logits(tokens)
    rows = torch.tensor([2, 0, 2, 1, 1])
    prefix = model.prefix(tokens[:, :7]).select(rows)
    found = model.continue_from(1, resid[rows, 7:], prefix=prefix)
    torch.testing.assert_close(found, whole[rows, 7:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama", "opt"])
def test_padding_after_it_stays_hidden(family):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, N_POS), [N_POS, 9], "right")
    whole = model.logits(tokens, mask)
    resid = resid_pre(model, 1, tokens)
    found = model.continue_from(1, resid[:, 6:], mask[:, 6:], prefix=model.prefix(tokens[:, :6]))
    shown = mask[:, 6:].bool()
    torch.testing.assert_close(found[shown], whole[:, 6:][shown], rtol=0, atol=1e-5)


def test_no_graph_is_kept():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(1, N_POS)
    prefix = model.prefix(tokens[:, :5])
    resid = resid_pre(model, 0, tokens)[:, 5:].requires_grad_()
    model.continue_from(0, resid, prefix=prefix)
    for layer in prefix.cache.layers:
        assert layer.keys.shape[2] == 5
        assert not layer.keys.requires_grad
        assert not layer.values.requires_grad


@pytest.mark.parametrize("n_before", [3, 8])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_kept_keys_and_values_serve_prompts_that_are_padded_on_the_left(family, n_before):
    model = wb.wrap(tiny_model(family))
    # The second prompt begins behind the first columns, the last one behind all of the prefix.
    tokens, mask = padded(random_tokens(3, N_POS), [N_POS, 10, 4], "left")
    names = ("resid_pre", "k", "v", "z")
    sites = [Site(name, layer) for name in names for layer in (0, 1)]
    found = model.capture(tokens, sites, attention_mask=mask)
    heads_first = [[found[Site(name, n)].transpose(1, 2) for name in "kv"] for n in (0, 1)]
    kept = [(k[:, :, :n_before], v[:, :, :n_before]) for k, v in heads_first]
    whole = model.logits(tokens, mask, last=1)
    prefix = model.kept_prefix(kept, mask[:, :n_before])
    rows = torch.tensor([2, 0, 1, 2])
    for layer in (0, 1):
        resid, z = (found[Site(name, layer)][rows, n_before:] for name in ("resid_pre", "z"))
        for given in ({}, {"z": z}):
            logits = model.continue_from(
                layer, resid, mask[rows, n_before:], last=1, prefix=prefix.select(rows), **given
            )
            torch.testing.assert_close(logits, whole[rows], rtol=0, atol=2e-5)


def test_what_cannot_have_a_prefix_is_refused_by_name():
    mamba = wb.wrap(tiny_model("mamba"))
    with pytest.raises(CapabilityError, match=r"unedited model.*\(mamba\) has none"):
        mamba.prefix(random_tokens(1, 4))
    model = wb.wrap(tiny_model("gpt2"))
    prefix = model.prefix(random_tokens(2, 4))
    with (
        model.edit(ZeroHeads(((0, 0),))),
        pytest.raises(CapabilityError, match=r"is edited.*without prefix"),
    ):
        model.continue_from(0, torch.zeros(2, 3, 32), prefix=prefix)
    with pytest.raises(DataError, match=r"one row a prompt.*2 and resid has 3"):
        model.continue_from(0, torch.zeros(3, 3, 32), prefix=prefix)
    with pytest.raises(DataError, match=r"n_ctx = 64.*4 \+ 61"):
        model.continue_from(0, torch.zeros(2, 61, 32), prefix=prefix)
    with pytest.raises(DataError, match="pad on the right"):
        model.continue_from(0, torch.zeros(2, 2, 32), torch.tensor([[0, 1], [1, 1]]), prefix=prefix)


def test_where_there_is_none_the_whole_pass_is_taken():
    toy = ToyAdapter(make_model(ToyModelConfig(d_vocab=101, n_layers=2, d_model=16, n_ctx=32), 0))
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(2, 6)
    assert prefix_of(toy, tokens) is None
    assert prefix_of(wb.wrap(tiny_model("mamba")), tokens) is None
    assert prefix_of(model, tokens[:, :0]) is None
    with model.edit(ZeroHeads(((0, 0),))):
        assert prefix_of(model, tokens) is None
    resid, prefix = resid_pre(model, 0, tokens), prefix_of(model, tokens[:, :2])
    assert prefix.n_pos == 2
    torch.testing.assert_close(
        continue_after(model, 0, resid[:, 2:], prefix, 3),
        continue_after(model, 0, resid, None, 3),
        rtol=0,
        atol=1e-5,
    )
