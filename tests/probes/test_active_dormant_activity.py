"""What a head does on a prompt, by hand and against eager passes, and which part makes the residual peak."""

import math

import pytest
import torch

import workbench as wb
from probes.active_dormant_activity import (
    column_entropy,
    first_and_rest,
    mean_over_queries,
    measure_activity,
    measure_peaks,
    row_entropy,
)
from tests.probes.dormant_models import small_tokens, toy
from tests.zoo import random_tokens, tiny_model
from workbench.attention.statistics import sink_logit_gap
from workbench.attention.written import output_grams, written_norm
from workbench.context import Batch
from workbench.models.base import Site

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
