"""The hf backend against plain transformers, on every family."""

import threading

import pytest
import torch

import workbench as wb
from tests.zoo import (
    ATTENTION_FAMILIES,
    FAMILIES,
    REFUSED_BY_HF,
    padded,
    random_tokens,
    tiny_model,
)
from workbench.attention.interface import AttentionSession
from workbench.attention.statistics import ColumnMean, RowEntropy, SinkMass
from workbench.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    EngineError,
    ModelError,
    UnknownNameError,
)
from workbench.models.base import Site
from workbench.models.inputs import prepare_inputs

LEARNED_SINKS = "gpt_oss"
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def stock_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def eager_run(family, tokens):
    """Attentions and hidden states of the same weights through plain eager transformers."""
    model = tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens, use_cache=False, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_reads_or_edits_are_bitwise_stock(family):
    tokens = random_tokens()
    model = tiny_model(family)
    expected = stock_logits(model, tokens)
    assert torch.equal(wb.wrap(model).logits(tokens), expected)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_pattern_equals_eager(family):
    tokens = random_tokens()
    expected = eager_run(family, tokens).attentions
    captured = wb.wrap(tiny_model(family)).capture(tokens, ["L0.pattern", "L1.pattern"])
    for layer in range(2):
        torch.testing.assert_close(captured[Site("pattern", layer)], expected[layer], **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_streamed_statistics_equal_those_of_the_eager_pattern(family):
    tokens = random_tokens()
    expected = eager_run(family, tokens).attentions
    wanted = {"received": ColumnMean(), "entropy": RowEntropy(), "mass": SinkMass((0, 2))}
    captured = wb.wrap(tiny_model(family)).capture(
        tokens, ["L0.pattern", "L1.pattern"], reduce={"pattern": wanted}
    )
    after = torch.arange(tokens.shape[1], 0, -1)
    for layer in range(2):
        found, pattern = captured[f"L{layer}.pattern"], expected[layer]
        torch.testing.assert_close(found["received"], pattern.sum(-2) / after, **TOLERANCE)
        torch.testing.assert_close(
            found["entropy"], torch.special.entr(pattern).sum(-1), **TOLERANCE
        )
        torch.testing.assert_close(found["mass"], pattern[..., [0, 2]].sum(-1), **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_hooked_forward_gives_the_same_residual_stream(family):
    tokens = random_tokens()
    hidden = eager_run(family, tokens).hidden_states
    sites = ["L0.pattern", "L0.resid_pre", "L1.resid_pre", "ln_final"]
    captured = wb.wrap(tiny_model(family)).capture(tokens, sites, reduce={"pattern": ColumnMean()})
    torch.testing.assert_close(captured["L0.resid_pre"], hidden[0], **TOLERANCE)
    torch.testing.assert_close(captured["L1.resid_pre"], hidden[1], **TOLERANCE)
    torch.testing.assert_close(captured["ln_final"], hidden[-1], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_is_the_sum_of_its_parts(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    parts = ["resid_pre", "mlp_out", "resid_post"]
    parts += ["attn_out"] if family != "mamba" else []
    parts += ["resid_mid"] if family not in ("mamba", "gpt_neox") else []
    found = model.capture(tokens, [f"L1.{part}" for part in parts])
    attn = found["L1.attn_out"] if "attn_out" in parts else 0.0
    total = found["L1.resid_pre"] + attn + found["L1.mlp_out"]
    torch.testing.assert_close(found["L1.resid_post"], total, **TOLERANCE)
    if "resid_mid" in parts:
        torch.testing.assert_close(found["L1.resid_mid"], found["L1.resid_pre"] + attn, **TOLERANCE)


@pytest.mark.parametrize(
    "family", [f for f in ATTENTION_FAMILIES if f not in ("olmo2", "gemma2", "gemma3_text")]
)
def test_w_o_turns_z_into_attn_out(family):
    tokens = random_tokens()
    model = wb.wrap(tiny_model(family))
    found = model.capture(tokens, ["L1.z", "L1.attn_out"])
    through = torch.einsum("bphd,hdm->bpm", found["L1.z"], model.weight("W_O", 1))
    # What remains is the output projection's bias, the same at every position.
    bias = found["L1.attn_out"] - through
    torch.testing.assert_close(bias, bias[:1, :1].expand_as(bias), **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "phi3", "gpt_oss"])
def test_w_v_turns_the_normed_stream_into_v(family):
    tokens = random_tokens()
    model = tiny_model(family)
    wrapped = wb.wrap(model)
    block = wrapped._blocks[1]
    norm = next(
        m
        for n, m in block.named_children()
        if n in ("ln_1", "input_layernorm", "self_attn_layer_norm")
    )
    found = wrapped.capture(tokens, ["L1.v", "L1.resid_pre"])
    with torch.no_grad():
        normed = norm(found["L1.resid_pre"])
    through = torch.einsum("bpm,hmd->bphd", normed, wrapped.weight("W_V", 1))
    bias = found["L1.v"] - through
    torch.testing.assert_close(bias, bias[:1, :1].expand_as(bias), **TOLERANCE)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_scores_make_the_pattern(family):
    tokens = random_tokens()
    found = wb.wrap(tiny_model(family)).capture(tokens, ["L1.attn_scores", "L1.pattern"])
    pattern, scores = found["L1.pattern"], found["L1.attn_scores"]
    assert torch.equal(scores == -torch.inf, pattern == 0.0)
    softmax = scores.softmax(dim=-1)
    if family == LEARNED_SINKS:  # the learned sink takes a share of every row
        pattern = pattern / pattern.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(pattern, softmax, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_equals_unpadded(family, side):
    lengths = [12, 8]
    tokens, mask = padded(random_tokens(), lengths, side)
    model = wb.wrap(tiny_model(family))
    if family == "mamba" and side == "left":
        with pytest.raises(CapabilityError, match="pad on the right"):
            model.logits(tokens, mask)
        return
    logits = model.logits(tokens, mask)
    sites = ["L1.resid_post"] + (["L1.pattern"] if family != "mamba" else [])
    captured = model.capture(tokens, sites, reduce={"pattern": ColumnMean()}, attention_mask=mask)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        alone = tokens[row][real][None]
        torch.testing.assert_close(logits[row][real][None], model.logits(alone), **TOLERANCE)
        single = model.capture(alone, sites, reduce={"pattern": ColumnMean()})
        torch.testing.assert_close(
            captured["L1.resid_post"][row][real], single["L1.resid_post"][0], **TOLERANCE
        )
        if family != "mamba":
            torch.testing.assert_close(
                captured["L1.pattern"][row][:, real], single["L1.pattern"][0], **TOLERANCE
            )
            assert (captured["L1.pattern"][row][:, ~real] == 0).all()
        assert length == int(real.sum())


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_left_padded_entropy_and_mass_equal_the_prompt_alone(family):
    tokens, mask = padded(random_tokens(), [12, 8], "left")
    model = wb.wrap(tiny_model(family))
    wanted = {"entropy": RowEntropy(), "mass": SinkMass((4,))}
    found = model.capture(tokens, ["L0.pattern"], {"pattern": wanted}, attention_mask=mask)[
        "L0.pattern"
    ]
    alone = model.capture(
        tokens[1:, 4:], ["L0.pattern"], {"pattern": {**wanted, "mass": SinkMass((0,))}}
    )
    for name, expected in alone["L0.pattern"].items():
        torch.testing.assert_close(found[name][1, :, 4:], expected[0], **TOLERANCE)
        assert (found[name][1, :, :4] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_in_a_batch_equals_the_prompt_alone(family):
    tokens = random_tokens(3)
    model = wb.wrap(tiny_model(family))
    together = model.capture(tokens, ["L1.resid_post"])["L1.resid_post"]
    alone = model.capture(tokens[1:2], ["L1.resid_post"])["L1.resid_post"]
    torch.testing.assert_close(together[1:2], alone, **TOLERANCE)


# Edits


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


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_stock_output_and_float32_statistics(dtype):
    tokens = random_tokens()
    inner = tiny_model("llama").to(dtype)
    model = wb.wrap(inner)
    seen = {}

    def keep(statistic):
        captured = model.capture(tokens, ["L1.pattern", "L1.resid_post"], {"pattern": statistic})
        seen["resid"] = captured["L1.resid_post"]
        return captured["L1.pattern"]

    received = keep(ColumnMean())
    stock = model.capture(tokens, ["L1.resid_post"])["L1.resid_post"]
    assert received.dtype == torch.float32
    assert torch.equal(seen["resid"], stock)
    whole = model.capture(tokens, ["L1.pattern"])["L1.pattern"]
    after = torch.arange(tokens.shape[1], 0, -1)
    torch.testing.assert_close(received, whole.sum(-2) / after, **TOLERANCE)


# Refusals


@pytest.mark.parametrize("family", REFUSED_BY_HF)
def test_families_outside_the_interface_are_refused_with_a_backend_that_can(family):
    with pytest.raises(CapabilityError, match="transformer-lens or nnsight"):
        wb.wrap(tiny_model(family))


def test_unknown_site_offers_the_nearest():
    model = wb.wrap(tiny_model("gpt2"))
    with pytest.raises(UnknownNameError, match=r"L0\.pattern"):
        model.capture(random_tokens(), ["L0.patern"])
    with pytest.raises(UnknownNameError, match="Did you mean"):
        model.capture(random_tokens(), ["blocks.0.attn.hook_patern"])


def test_transformer_lens_names_find_the_same_sites():
    captured = wb.wrap(tiny_model("gpt2")).capture(
        random_tokens(), ["blocks.1.attn.hook_pattern", "hook_embed"]
    )
    assert torch.equal(captured["L1.pattern"], captured["blocks.1.attn.hook_pattern"])
    assert captured["embed"].shape == (2, 12, 32)
    with pytest.raises(KeyError, match=r"L0\.z was not captured"):
        captured["L0.z"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4), 101), r"0 \.\.\. 100.*got 101 in prompt 0 at position 0"),
        (torch.full((1, 4), -1), "got -1"),
        (torch.zeros(1, 65, dtype=torch.long), "at most n_ctx = 64"),
        (torch.zeros(4, dtype=torch.long), "a single prompt is"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 4), "int64"),
    ],
)
def test_impossible_tokens_are_refused(tokens, message):
    # Through prepare_inputs: the suite checks the shapes in the adapters' own signatures first.
    with pytest.raises(DataError, match=message):
        prepare_inputs(wb.wrap(tiny_model("gpt2")).spec, tokens)


def test_mask_with_a_hole_is_refused():
    with pytest.raises(DataError, match="holes"):
        wb.wrap(tiny_model("gpt2")).logits(random_tokens(1, 4), torch.tensor([[1, 0, 1, 1]]))


def test_layers_and_heads_that_do_not_exist_are_refused():
    model = wb.wrap(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="layer must be below 2"):
        model.capture(random_tokens(), ["L2.z"])
    with (
        pytest.raises(ConfigError, match="2 layers x 4 heads"),
        model.edit(wb.ZeroHeads(((0, 4),))),
    ):
        pass


def test_parallel_block_has_no_resid_mid():
    with pytest.raises(CapabilityError, match="parallel"):
        wb.wrap(tiny_model("gpt_neox")).capture(random_tokens(), ["L0.resid_mid"])


def test_mamba_has_residual_sites_only():
    model = wb.wrap(tiny_model("mamba"))
    assert "attention" not in model.capabilities
    with pytest.raises(CapabilityError, match="has none"):
        model.capture(random_tokens(), ["L0.pattern"])
    with pytest.raises(ConfigError, match="0 heads of mamba"), model.edit(wb.ZeroHeads(((0, 0),))):
        pass


def test_nan_weights_are_refused():
    inner = tiny_model("gpt2")
    with torch.no_grad():
        inner.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight"):
        wb.wrap(inner)


def test_other_stock_kernels_are_refused_by_name():
    model = wb.wrap(tiny_model("gpt2"))
    model.stock = "flash_attention_2"
    with pytest.raises(CapabilityError, match=r"loaded with flash_attention_2.*'sdpa'"):
        model.capture(random_tokens(), ["L0.z"])


def test_softcap_on_a_kernel_that_drops_it_is_refused():
    module = torch.nn.Identity()  # transformers 5.17 hands a softcap to SDPA
    session = AttentionSession("sdpa", {module: 0}, {}, {})
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(CapabilityError, match="attn_implementation='eager'"):
        session.attend(module, x, x, x, None, 1.0, {"softcap": 5.0})


def test_unknown_object_is_refused():
    with pytest.raises(ModelError, match=r"got builtins\.int"):
        wb.wrap(3)


def test_prompt_and_new_tokens_must_fit_learned_positions():
    with pytest.raises(DataError, match="60 \\+ 9"):
        wb.wrap(tiny_model("gpt2")).generate(random_tokens(1, 60), max_new_tokens=9)
