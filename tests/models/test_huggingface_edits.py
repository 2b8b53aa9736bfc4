"""Edits on the hf backend against their definitions, and that nothing of them stays behind."""

import threading

import pytest
import torch

import workbench as wb
from tests.models.stock import TOLERANCE, stock_logits
from tests.zoo import (
    ATTENTION_FAMILIES,
    FAMILIES,
    padded,
    random_tokens,
    tiny_model,
)
from workbench.attention.statistics import ColumnMean
from workbench.errors import (
    ConfigError,
    EngineError,
)


def no_ops(spec):
    return [
        wb.ZeroTuning(1.0),
        wb.ZeroTuning(2.0, heads=()),
        wb.ZeroHeads(()),
        wb.AddVector("L0.resid_post", torch.zeros(spec.d_model)),
    ]


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_no_op_edits_are_bitwise_stock(family):
    tokens = random_tokens()
    model = tiny_model(family)
    expected = stock_logits(model, tokens)
    wrapped = wb.wrap(model)
    for intervention in no_ops(wrapped.spec):
        with wrapped.edit(intervention):
            assert torch.equal(wrapped.logits(tokens), expected), intervention.name


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_zerotuning_equals_its_definition_on_the_eager_pattern(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    before = model.capture(tokens, ["L0.pattern", "L0.v"])
    pattern = before["L0.pattern"]
    first = 3.0 * pattern[..., :1]
    edited = torch.cat([first, pattern[..., 1:]], -1) / (1 + 2.0 * pattern[..., :1])
    value = before["L0.v"].repeat_interleave(model.spec.n_heads // model.spec.n_kv_heads, dim=2)
    with model.edit(wb.ZeroTuning(3.0)):
        output_form = model.capture(tokens, ["L0.z"])["L0.z"]
        with_pattern = model.capture(tokens, ["L0.pattern", "L0.z"])
    torch.testing.assert_close(with_pattern["L0.pattern"], edited, **TOLERANCE)
    mixed = torch.einsum("bhqk,bkhd->bqhd", edited, value)
    torch.testing.assert_close(output_form, mixed, **TOLERANCE)
    torch.testing.assert_close(with_pattern["L0.z"], mixed, **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_left_padded_edit_equals_the_prompt_alone(family):
    tokens, mask = padded(random_tokens(), [12, 8], "left")
    model = wb.wrap(tiny_model(family))
    with model.edit(wb.ZeroTuning(4.0)):
        together = model.logits(tokens, mask)
        alone = model.logits(tokens[1:, 4:])
    torch.testing.assert_close(together[1:, 4:], alone, **TOLERANCE)
    assert (alone - model.logits(tokens[1:, 4:])).abs().max() > 1e-2


def test_zeroed_head_contributes_nothing():
    tokens = random_tokens()
    model = wb.wrap(tiny_model("llama"))
    with model.edit(wb.ZeroHeads(((1, 2),))):
        z = model.capture(tokens, ["L1.z"])["L1.z"]
    assert (z[:, :, 2] == 0).all()
    assert (z[:, :, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_added_vector_arrives_at_its_site(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    vector = torch.arange(model.spec.d_model, dtype=torch.float32)
    plain = model.capture(tokens, ["L0.resid_post", "L0.mlp_out"])
    with model.edit(wb.AddVector("L0.mlp_out", vector, scale=0.1)):
        edited = model.capture(tokens, ["L1.resid_pre"])["L1.resid_pre"]
    torch.testing.assert_close(edited, plain["L0.resid_post"] + 0.1 * vector, **TOLERANCE)


def test_nested_edits_add_up_and_end_with_their_blocks():
    tokens = random_tokens()
    model = wb.wrap(tiny_model("gpt2"))
    plain = model.logits(tokens)
    with model.edit(wb.ZeroTuning(2.0)):
        outer = model.logits(tokens)
        with model.edit(wb.ZeroTuning(3.0)):
            both = model.logits(tokens)
        assert torch.equal(model.logits(tokens), outer)
    with model.edit(wb.ZeroTuning(6.0)):  # gamma composes by multiplication (card section 2)
        torch.testing.assert_close(model.logits(tokens), both, **TOLERANCE)
    assert torch.equal(model.logits(tokens), plain)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"]
)
def test_edit_hits_every_generated_token(family, use_cache):
    tokens = random_tokens(2, 6)
    model = wb.wrap(tiny_model(family))
    with model.edit(wb.ZeroTuning(5.0)):
        generated = model.generate(tokens, max_new_tokens=6, use_cache=use_cache, eos_token_id=None)
        step = tokens
        for _ in range(6):
            step = torch.cat([step, model.logits(step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, step)


def test_left_padded_generation_equals_the_prompt_alone():
    tokens, mask = padded(random_tokens(2, 9), [9, 5], "left")
    model = wb.wrap(tiny_model("llama"))
    options = {"max_new_tokens": 5, "eos_token_id": None}
    with model.edit(wb.ZeroTuning(5.0)):
        together = model.generate(tokens, attention_mask=mask, **options)
        alone = model.generate(tokens[1:, 4:], **options)
    assert torch.equal(together[1, 4:], alone[0])


def test_beams_repeat_their_prompts_first_key():
    tokens, mask = padded(random_tokens(2, 9), [9, 5], "left")
    model = wb.wrap(tiny_model("llama"))
    options = {"max_new_tokens": 4, "eos_token_id": None, "num_beams": 3}
    with model.edit(wb.ZeroTuning(5.0)):
        together = model.generate(tokens, attention_mask=mask, **options)
        alone = model.generate(tokens[1:, 4:], **options)
    assert torch.equal(together[1, 4:], alone[0])


# Nothing stays behind


def test_one_statistic_may_stand_alone():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens()
    alone = model.capture(tokens, ["L1.pattern"], ColumnMean())["L1.pattern"]
    named = model.capture(tokens, ["L1.pattern"], {"pattern": ColumnMean()})["L1.pattern"]
    assert torch.equal(alone, named)
    with pytest.raises(ConfigError, match="reads the site pattern only"):
        model.capture(tokens, ["L1.z"], ColumnMean())


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("interrupt", [ValueError, KeyboardInterrupt])
def test_exception_in_a_reduction_leaves_the_model_stock(interrupt):
    tokens = random_tokens()
    inner = tiny_model("gpt2")
    model = wb.wrap(inner)
    expected = stock_logits(inner, tokens)

    def fail(activation):
        raise interrupt("stop")

    with pytest.raises(interrupt):
        model.capture(tokens, ["L0.resid_pre", "L1.z"], reduce={"z": fail})
    assert n_hooks(inner) == 0
    assert inner.config._attn_implementation == "sdpa"
    assert torch.equal(stock_logits(inner, tokens), expected)


def test_two_models_do_not_see_each_other():
    tokens = random_tokens()
    first, second = wb.wrap(tiny_model("gpt2")), wb.wrap(tiny_model("gpt2", seed=1))
    expected = second.logits(tokens)
    seen = []

    def peek(activation):
        seen.append(second.logits(tokens))
        return activation.mean()

    with first.edit(wb.ZeroTuning(9.0)):
        first.capture(tokens, ["L0.z"], reduce=peek)
    assert torch.equal(seen[0], expected)


def test_threads_take_turns_on_one_model():
    model = wb.wrap(tiny_model("gpt2"))
    prompts = [random_tokens(1, seed=seed) for seed in range(8)]
    expected = [
        model.capture(p, ["L1.pattern"], {"pattern": ColumnMean()})["L1.pattern"] for p in prompts
    ]
    found = [None] * 8

    def work(index):
        found[index] = model.capture(prompts[index], ["L1.pattern"], {"pattern": ColumnMean()})[
            "L1.pattern"
        ]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layer_outside_the_hook_point_is_an_error():
    inner = tiny_model("gpt2")
    model = wb.wrap(inner)
    skipped = inner.transformer.h[1].attn
    skipped.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)
    with pytest.raises(EngineError, match=r"layers \[1\]"):
        model.capture(random_tokens(), ["L0.pattern"], {"pattern": ColumnMean()})
