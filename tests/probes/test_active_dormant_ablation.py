"""Losses without a head, against forward passes done by hand with hooks of their own."""

import dataclasses
import math

import pytest
import torch

import workbench as wb
from probes.active_dormant_ablation import (
    ABLATIONS,
    ReplaceHeads,
    ablate_all_heads,
    prompt_loss,
    rows_at_once,
)
from tests.probes.dormant_models import small_tokens, toy
from tests.probes.stopped import Stopped
from tests.zoo import padded, random_tokens, tiny_model
from workbench.context import Context
from workbench.models.base import Site


def loss_of(logits, tokens):
    """By PyTorch's own cross-entropy, prompt by prompt."""
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(scores[:-1], ids[1:])
            for scores, ids in zip(logits, tokens, strict=True)
        ]
    )


# Loss


def test_loss_worked_by_hand():
    # Two tokens to choose from; p(target) = 3/4 after the first position, 1/2 after the second.
    logits = torch.tensor([[[math.log(3.0), 0.0], [1.0, 1.0], [9.0, -9.0]]])
    tokens = torch.tensor([[1, 0, 1]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert prompt_loss(logits, tokens, None).item() == pytest.approx(expected)
    # The second target is padding.
    mask = torch.tensor([[1, 1, 0]])
    assert prompt_loss(logits, tokens, mask).item() == pytest.approx(math.log(4 / 3))


def test_rows_of_a_pass_follow_the_logits():
    spec = wb.wrap(tiny_model("gpt2")).spec
    assert rows_at_once(spec, 64, 7) == 7
    assert rows_at_once(spec, 10**9, None) == 1
    assert rows_at_once(spec, 64, None) == 2048 // 64
    large = dataclasses.replace(spec, d_vocab=2**18)  # a MiB of logits a token
    assert rows_at_once(large, 64, None) == 4


# Ablation against forward passes with hooks of its own


def hooked_gpt2(model, tokens, layer, head, *, move):
    attn, width = model.transformer.h[layer].attn, model.config.n_embd
    part = slice(head * 8, head * 8 + 8)
    value = []
    hooks = [
        attn.c_attn.register_forward_hook(
            lambda m, a, out: value.append(out[:, :1, 2 * width :][..., part])
        ),
        attn.c_proj.register_forward_pre_hook(
            lambda m, args: (replaced(args[0], part, value[0] if move else 0.0),)
        ),
    ]
    return run_and_unhook(model, tokens, hooks)


def hooked_llama(model, tokens, layer, head, *, move):
    attn = model.model.layers[layer].self_attn
    part, shared = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
    value = []
    hooks = [
        attn.v_proj.register_forward_hook(lambda m, a, out: value.append(out[:, :1, shared])),
        attn.o_proj.register_forward_pre_hook(
            lambda m, args: (replaced(args[0], part, value[0] if move else 0.0),)
        ),
    ]
    return run_and_unhook(model, tokens, hooks)


def replaced(z, part, value):
    z = z.clone()
    z[..., part] = value
    return z


def run_and_unhook(model, tokens, hooks):
    with torch.no_grad():
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return loss_of(logits, tokens)


@pytest.mark.parametrize(("family", "hooked"), [("gpt2", hooked_gpt2), ("llama", hooked_llama)])
def test_every_head_changes_the_loss_as_hooks_by_hand_do(family, hooked):
    tokens, model = random_tokens(3), tiny_model(family, attn_implementation="eager")
    loss, change = ablate_all_heads(wb.wrap(tiny_model(family)), tokens, Context(), n_rows=5)
    with torch.no_grad():
        base = loss_of(model(tokens).logits, tokens)
    torch.testing.assert_close(loss, base, rtol=0, atol=1e-4)
    for ablation, layer, head in torch.cartesian_prod(*map(torch.arange, (2, 2, 4))).tolist():
        expected = hooked(model, tokens, layer, head, move=bool(ablation)) - base
        found = change[ablation, :, layer, head]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert change.abs().mean() > 0.01  # the heads matter, so agreement says something


def test_moving_to_the_first_token_is_a_one_hot_pattern():
    model, tokens = toy(), small_tokens()
    _, change = ablate_all_heads(wb.wrap(model), tokens, Context(), n_rows=100)
    with torch.no_grad():
        base = loss_of(model(tokens).logits, tokens)
        for layer in range(2):
            for head in range(3):

                def one_hot(site, x, layer=layer, head=head):
                    if site != Site("pattern", layer):
                        return x
                    x = x.clone()
                    x[:, head] = 0.0
                    x[:, head, :, 0] = 1.0
                    return x

                expected = loss_of(model(tokens, tap=one_hot).logits, tokens) - base
                found = change[ABLATIONS.index("moved to BOS"), :, layer, head]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_head_that_writes_nothing_is_not_missed():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[8:16] = 0.0
    _, change = ablate_all_heads(wb.wrap(model), random_tokens(3), Context(), n_rows=8)
    assert change[:, :, 1, 1].abs().max() < 1e-5
    assert change[:, :, 1, 2].abs().max() > 1e-3


# What must not change the numbers


@pytest.mark.parametrize("n_rows", [1, 7, 1000])
def test_rows_of_a_pass_change_nothing(n_rows):
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(3)
    expected = ablate_all_heads(model, tokens, Context(), n_rows=16)
    found = ablate_all_heads(model, tokens, Context(batch_size=2), n_rows)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


def refuse(*_):
    raise AssertionError("a model without the capability was asked to go on from a layer")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "olmo2"])
def test_whole_forward_passes_give_the_same_numbers(family, monkeypatch):
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2)
    assert "continue" in model.capabilities
    expected = ablate_all_heads(model, tokens, Context(), n_rows=16)
    without = model.capabilities - {"continue"}
    monkeypatch.setattr(type(model), "capabilities", property(lambda model: without))
    monkeypatch.setattr(type(model), "continue_from", refuse)
    found = ablate_all_heads(model, tokens, Context(), n_rows=16)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_padded_prompt_loses_what_it_loses_alone(family):
    tokens, mask = padded(random_tokens(3), [12, 7, 4], "right")
    model = wb.wrap(tiny_model(family))
    loss, change = ablate_all_heads(model, tokens, Context(attention_mask=mask), n_rows=11)
    for row, length in enumerate([12, 7, 4]):
        alone = ablate_all_heads(model, tokens[row : row + 1, :length], Context(), n_rows=11)
        torch.testing.assert_close(loss[row : row + 1], alone[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(change[:, row : row + 1], alone[1], rtol=0, atol=2e-5)


def test_every_row_has_its_own_head():
    z = torch.arange(24.0).view(2, 2, 3, 2)
    edit = ReplaceHeads(0, torch.tensor([2, 0]), torch.tensor([[0.0, 0.0], [7.0, 8.0]]))
    (change,) = edit.plan(wb.wrap(tiny_model("gpt2")).spec)
    changed = change.change(z)
    assert changed[0, :, 2].tolist() == [[0.0, 0.0]] * 2
    assert changed[1, :, 0].tolist() == [[7.0, 8.0]] * 2
    assert torch.equal(changed[0, :, :2], z[0, :, :2])
    assert torch.equal(changed[1, :, 1:], z[1, :, 1:])
    assert torch.equal(z, torch.arange(24.0).view(2, 2, 3, 2))


def test_finished_layers_are_not_measured_again():
    keep = Stopped(after=4)
    model, tokens = wb.wrap(toy()), small_tokens(4)
    context = Context(batch_size=2, keep=keep)
    with pytest.raises(KeyboardInterrupt):
        ablate_all_heads(model, tokens, context, n_rows=6)
    first, keep.after = dict(keep.kept), None
    found = ablate_all_heads(model, tokens, context, n_rows=6)
    assert {name: keep.kept[name] for name in first} == first
    assert len(keep.kept) == 2 * (1 + 2)  # by batch: the intact loss, and two layers
    expected = ablate_all_heads(model, tokens, Context(), n_rows=6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
