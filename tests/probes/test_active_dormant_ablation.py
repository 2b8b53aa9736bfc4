"""Losses without a head, and what heads do on a prompt, against forward passes done by hand."""

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
from probes.active_dormant_activity import (
    column_entropy,
    first_and_rest,
    mean_over_queries,
    measure_activity,
    measure_peaks,
    row_entropy,
)
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.attention.statistics import sink_logit_gap
from workbench.attention.written import output_grams, written_norm
from workbench.context import Batch, Context
from workbench.models.base import Site

TOY = ToyModelConfig(d_vocab=50, n_ctx=16, n_layers=2, n_heads=3, d_model=24, d_mlp=32)


def toy(**changes):
    model = make_model(ToyModelConfig(**{**vars(TOY), **changes}), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model.eval()


def small_tokens(n_prompts=3, n_pos=10):
    return random_tokens(n_prompts, n_pos) % 50


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
    kept = {}

    def keep(name, compute):
        if name not in kept:
            if len(kept) == stop:
                raise KeyboardInterrupt
            kept[name] = compute()
        return kept[name]

    model, tokens = wb.wrap(toy()), small_tokens(4)
    context, stop = Context(batch_size=2, keep=keep), 4
    with pytest.raises(KeyboardInterrupt):
        ablate_all_heads(model, tokens, context, n_rows=6)
    first, stop = dict(kept), -1
    found = ablate_all_heads(model, tokens, context, n_rows=6)
    assert {name: kept[name] for name in first} == first
    assert len(kept) == 2 * (1 + 2)  # by batch: the intact loss, and two layers
    expected = ablate_all_heads(model, tokens, Context(), n_rows=6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# What a head does on a prompt


def test_means_leave_the_first_two_queries_and_padding_out():
    x = torch.tensor([[[9.0, 9.0, 1.0, 2.0, 50.0]], [[9.0, 9.0, 4.0, math.nan, 6.0]]])
    valid = torch.tensor([[1.0, 1, 1, 1, 0], [1.0, 1, 1, 1, 1]])
    assert mean_over_queries(x, valid).tolist() == [[1.5], [5.0]]


def test_entropies_worked_by_hand():
    # Uniform rows have the entropy log(n + 1); a one-hot row has none.
    entropy = torch.tensor([[[0.0, math.log(2), math.log(3), 0.0]]])
    found = row_entropy(entropy)[0, 0]
    torch.testing.assert_close(found[1:], torch.tensor([1.0, 1.0, 0.0]))
    # All attention to one of four keys: 0. Evenly to all four: 1 (received = 1/T over T - k rows).
    valid = torch.ones(2, 4)
    sink, even = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1 / 4, 1 / 3, 1 / 2, 1.0])
    found = column_entropy(torch.stack([sink, even])[:, None], valid)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1.0]))
    # Half to each of two keys out of four: log 2 / log 4.
    half = torch.tensor([[[1 / 4, 1 / 3, 0.0, 0.0]]])
    assert column_entropy(half, valid[:1]).item() == pytest.approx(0.5)


def test_norms_behind_the_output_projection():
    generator = torch.Generator().manual_seed(0)
    value, w_o = (torch.randn(*size, generator=generator) for size in ((2, 5, 2, 3), (4, 3, 12)))
    repeated = value.repeat_interleave(2, dim=2)
    expected = torch.einsum("bphd,hdm->bhpm", repeated, w_o).norm(dim=-1)
    torch.testing.assert_close(written_norm(value, w_o @ w_o.transpose(-1, -2)), expected)


def test_the_first_position_against_the_mean_of_the_others():
    x = torch.tensor([[[6.0, 1.0, 3.0, 99.0]]])
    first, rest = first_and_rest(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert (first.item(), rest.item()) == (6.0, 2.0)


def test_gap_leaves_the_querys_own_score_out():
    scores = torch.tensor([[1.0, -math.inf, -math.inf], [1.0, 2.0, -math.inf], [7.0, 3.0, 90.0]])
    found = sink_logit_gap(scores[None, None])[0, 0]
    assert found[:2].isnan().all()
    assert found[2].item() == 4.0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_activity_equals_that_of_eager_transformers(family):
    tokens, n_pos = random_tokens(3), 12
    model, eager = wb.wrap(tiny_model(family)), tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        out = eager(tokens, output_attentions=True, output_hidden_states=True)
    found = measure_activity(model, Batch(tokens, None, 0), output_grams(model))
    pattern = torch.stack(out.attentions, dim=1)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found["sink"], pattern[..., 2:, 0].mean(-1), **close)
    visible = torch.arange(1, n_pos + 1)
    entropy = torch.special.entr(pattern).sum(-1) / visible.log()
    torch.testing.assert_close(found["row_entropy"], entropy[..., 2:].mean(-1), **close)
    share = pattern.sum(-2) / n_pos
    column = torch.special.entr(share).sum(-1) / math.log(n_pos)
    torch.testing.assert_close(found["column_entropy"], column, **close)
    resid = out.hidden_states[0].norm(dim=-1), out.hidden_states[1].norm(dim=-1)
    for depth in range(2):
        torch.testing.assert_close(found["resid_bos"][:, depth], resid[depth][:, 0], **close)
        torch.testing.assert_close(
            found["resid_rest"][:, depth], resid[depth][:, 1:].mean(1), **close
        )


def test_a_toy_without_softmax_has_the_gap_of_its_scores():
    model = toy(attention="relu")
    tokens = small_tokens()
    seen = {}
    with torch.no_grad():
        model(tokens, tap=lambda site, x: seen.setdefault(site, x) if x is not None else x)
    found = measure_activity(wb.wrap(model), Batch(tokens, None, 0), output_grams(wb.wrap(model)))
    scores = seen[Site("attn_scores", 1)]
    by_hand = [
        scores[0, 0, n, 0] - sum(scores[0, 0, n, j] for j in range(1, n)) / (n - 1)
        for n in range(2, 10)
    ]
    expected = sum(by_hand) / len(by_hand)
    torch.testing.assert_close(found["gap"][0, 1, 0], expected, rtol=1e-4, atol=1e-5)


# Who makes the residual peak


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_peaks_without_a_part_equal_whole_prompts_with_the_part_zeroed(family):
    tokens, reference = random_tokens(3), tiny_model(family)
    tokens[2, 0] = tokens[0, 0]  # two prompts with one first token
    peaks = measure_peaks(wb.wrap(tiny_model(family)), tokens[:, 0])
    stem = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}[family]
    blocks = reference.get_submodule(stem)
    names = {
        "gpt2": ("attn", "mlp"),
        "llama": ("self_attn", "mlp"),
        "gpt_neox": ("attention", "mlp"),
    }
    for part, name in enumerate(names[family]):
        for layer, block in enumerate(blocks):
            norms = []

            def note_input(module, args, norms=norms):
                norms.append(args[0][:, 0].norm(dim=-1))

            def note_output(module, args, out, norms=norms):
                norms.append((out[0] if isinstance(out, tuple) else out)[:, 0].norm(dim=-1))

            def zero(module, args, out):
                if isinstance(out, tuple):
                    return (torch.zeros_like(out[0]), *out[1:])
                return torch.zeros_like(out)

            hooks = [block.get_submodule(name).register_forward_hook(zero)]
            hooks.append(blocks[0].register_forward_pre_hook(note_input))
            hooks += [each.register_forward_hook(note_output) for each in blocks]
            with torch.no_grad():
                reference(tokens)
            for hook in hooks:
                hook.remove()
            expected = torch.stack(norms).amax(dim=0)
            torch.testing.assert_close(peaks[:, part, layer], expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_mlp_has_no_peak_without_it():
    peaks = measure_peaks(wb.wrap(toy(d_mlp=0)), torch.tensor([3, 4]))
    assert peaks[:, 1].isnan().all()
    assert peaks[:, 0].isfinite().all()
